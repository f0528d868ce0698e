#pragma once

#include <cstdint>

#include "core/isa.h"

namespace metarec {

// The two least distances among the codes offered so far. Start from {inf, inf, -1}.
struct Nearest {
    double least, second;
    int64_t index;
};

}  // namespace metarec

// The definition's distance: sum over d in order of (x_d - c_d)^2, each operation rounded to float64. Offers count
// codes, in ascending order, to `nearest`; the first of equal distances stays. Distances that are not finite are no
// offer.
METAREC_KERNEL(void offer_exact_f32(Nearest* nearest, const float* x, const float* codebook, const int32_t* codes,
                                    int64_t count, int64_t dim))
// Every row of x [H, rows, dim] against every code of its head; margin may be null.
METAREC_KERNEL(void nearest_codeword_f64(const double* x, const double* codebook, int64_t heads, int64_t rows,
                                         int64_t codes, int64_t dim, int64_t* indices, float* margin))
