#pragma once

#include <cstdint>

#include "core/isa.h"

namespace metarec {

// Which code is the nearest: that of least squared distance, or that of largest inner product.
enum class Metric { distance, product };

// The two least costs among the codes offered so far. Start from {inf, inf, -1}.
struct Nearest {
    double least, second;
    int64_t index;
};

}  // namespace metarec

// The definition's cost: sum over d in order of (x_d - c_d)^2, or minus the sum of x_d c_d, each operation rounded to
// float64. Offers count codes, in ascending order, to `nearest`; the first of equal costs stays. Costs that are not
// finite are no offer.
METAREC_KERNEL(void offer_exact_f32(Nearest* nearest, const float* x, const float* codebook, const int32_t* codes,
                                    int64_t count, int64_t dim, Metric metric))
// Every row of x [H, rows, dim] against every code of its head; margin may be null.
METAREC_KERNEL(void nearest_codeword_f64(const double* x, const double* codebook, int64_t heads, int64_t rows,
                                         int64_t codes, int64_t dim, Metric metric, int64_t* indices, float* margin))
