#pragma once

#include <cstdint>

#include "core/isa.h"

namespace metarec {

// Rows of one code that are summed together: the unit of parallel work, so that neither the order of additions nor the
// result depends on the number of threads.
struct RowGroup {
    int64_t begin, end;  // in the rows sorted by code
    int64_t target;      // row of the array that gets the sum
};

}  // namespace metarec

// kept[row] = 1 if every element of the row is finite, else 0.
METAREC_KERNEL(void finite_rows_f32(const float* x, int64_t rows, int64_t dim, uint8_t* kept))
METAREC_KERNEL(void finite_rows_f64(const double* x, int64_t rows, int64_t dim, uint8_t* kept))
// sums[target] = sum of weight * row over each group in order; weight may be null.
METAREC_KERNEL(void sum_groups_f32(const float* x, const float* weight, const int64_t* order, const RowGroup* groups,
                                   int64_t count, int64_t dim, float* sums))
METAREC_KERNEL(void sum_groups_f64(const double* x, const double* weight, const int64_t* order, const RowGroup* groups,
                                   int64_t count, int64_t dim, double* sums))
