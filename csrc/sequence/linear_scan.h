#pragma once

#include <cstdint>

#include "core/isa.h"

// h_t = a * h_{t-1} + u_t within each segment [offsets[b], offsets[b+1]); backwards in time if reverse.
// Complex numbers are split: a is [2, D], u and h are [T, 2, D], plane 0 real and plane 1 imaginary.
METAREC_KERNEL(void linear_scan_f32(const float* a, const float* u, const int64_t* offsets, float* h, int64_t segments,
                                    int64_t width, bool reverse))
METAREC_KERNEL(void linear_scan_f64(const double* a, const double* u, const int64_t* offsets, double* h,
                                    int64_t segments, int64_t width, bool reverse))

// From grad_h and the scan's result h, the gradients of u and a in one pass: grad_u is the scan of grad_h by conj(a)
// the other way, and grad_a = sum_t grad_u_t conj(h_{t-1}). Results do not depend on the number of threads. partial:
// [kScanGroups, 2, D].
namespace metarec {
constexpr int64_t kScanGroups = 16;
}
METAREC_KERNEL(void linear_scan_backward_f32(const float* a, const float* h, const float* grad_h,
                                             const int64_t* offsets, float* grad_a, float* grad_u, float* partial,
                                             int64_t segments, int64_t width, bool reverse))
METAREC_KERNEL(void linear_scan_backward_f64(const double* a, const double* h, const double* grad_h,
                                             const int64_t* offsets, double* grad_a, double* grad_u, double* partial,
                                             int64_t segments, int64_t width, bool reverse))
