#include "sequence/linear_scan.h"

namespace metarec::METAREC_ISA {
namespace {

template <typename T>
inline void scan(const T* __restrict a, const T* __restrict u, const int64_t* __restrict offsets, T* __restrict h,
                 int64_t segments, int64_t width, bool reverse) {
    const int64_t row = 2 * width;
#pragma omp parallel for schedule(dynamic, 16) if (segments > 32)
    for (int64_t segment = 0; segment < segments; ++segment) {
        const int64_t begin = offsets[segment], end = offsets[segment + 1];
        const int64_t step = reverse ? -1 : 1;
        for (int64_t i = 0; i < end - begin; ++i) {
            const int64_t t = reverse ? end - 1 - i : begin + i;
            const T* __restrict u_t = u + t * row;
            T* __restrict h_t = h + t * row;
            if (i == 0) {
                for (int64_t d = 0; d < row; ++d) h_t[d] = u_t[d];
                continue;
            }
            const T* __restrict last = h + (t - step) * row;
            for (int64_t d = 0; d < width; ++d) {
                h_t[d] = a[d] * last[d] - a[width + d] * last[width + d] + u_t[d];
                h_t[width + d] = a[d] * last[width + d] + a[width + d] * last[d] + u_t[width + d];
            }
        }
    }
}

}  // namespace

void linear_scan_f32(const float* a, const float* u, const int64_t* offsets, float* h, int64_t segments, int64_t width,
                     bool reverse) {
    scan(a, u, offsets, h, segments, width, reverse);
}

void linear_scan_f64(const double* a, const double* u, const int64_t* offsets, double* h, int64_t segments,
                     int64_t width, bool reverse) {
    scan(a, u, offsets, h, segments, width, reverse);
}

}  // namespace metarec::METAREC_ISA
