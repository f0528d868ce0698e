#pragma once

#include <cstdint>

#include "core/isa.h"

// h_t = a * h_{t-1} + u_t within each segment [offsets[b], offsets[b+1]); backwards in time if reverse.
// Complex numbers are split: a is [2, D], u and h are [T, 2, D], plane 0 real and plane 1 imaginary.
METAREC_KERNEL(void linear_scan_f32(const float* a, const float* u, const int64_t* offsets, float* h, int64_t segments,
                                    int64_t width, bool reverse))
METAREC_KERNEL(void linear_scan_f64(const double* a, const double* u, const int64_t* offsets, double* h,
                                    int64_t segments, int64_t width, bool reverse))
