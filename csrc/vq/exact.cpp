// Compiled with -ffp-contract=off: a fused multiply-add would round differently from the definition.
#include "vq/exact.h"

namespace metarec::METAREC_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr int kAtOnce = 8;  // independent sums, to hide the latency of each

template <typename T>
inline void offer(Nearest* nearest, const T* x, const T* const* code, const int64_t* index, int count, int64_t dim,
                  Metric metric) {
    double sum[kAtOnce] = {};
    if (metric == Metric::distance) {
        for (int64_t d = 0; d < dim; ++d) {
            const double value = x[d];
            for (int j = 0; j < kAtOnce; ++j) {
                const double difference = value - code[j][d];
                sum[j] += difference * difference;
            }
        }
    } else {
        for (int64_t d = 0; d < dim; ++d) {
            const double value = x[d];
            for (int j = 0; j < kAtOnce; ++j) sum[j] -= value * code[j][d];
        }
    }
    for (int j = 0; j < count; ++j) {
        if (!(sum[j] > -kInfinity)) continue;
        if (sum[j] < nearest->least) {
            nearest->second = nearest->least;
            nearest->least = sum[j];
            nearest->index = index[j];
        } else if (sum[j] < nearest->second) {
            nearest->second = sum[j];
        }
    }
}

}  // namespace

void offer_exact_f32(Nearest* nearest, const float* x, const float* codebook, const int32_t* codes, int64_t count,
                     int64_t dim, Metric metric) {
    for (int64_t first = 0; first < count; first += kAtOnce) {
        const int n = static_cast<int>(count - first < kAtOnce ? count - first : kAtOnce);
        const float* code[kAtOnce];
        int64_t index[kAtOnce];
        for (int j = 0; j < kAtOnce; ++j) {
            index[j] = codes[first + (j < n ? j : 0)];
            code[j] = codebook + index[j] * dim;
        }
        offer(nearest, x, code, index, n, dim, metric);
    }
}

void nearest_codeword_f64(const double* x, const double* codebook, int64_t heads, int64_t rows, int64_t codes,
                          int64_t dim, Metric metric, int64_t* indices, float* margin) {
#pragma omp parallel for schedule(static) if (heads * rows * codes * dim > 1 << 15)
    for (int64_t row = 0; row < heads * rows; ++row) {
        const double* table = codebook + row / rows * codes * dim;
        Nearest nearest = {kInfinity, kInfinity, -1};
        for (int64_t first = 0; first < codes; first += kAtOnce) {
            const int n = static_cast<int>(codes - first < kAtOnce ? codes - first : kAtOnce);
            const double* code[kAtOnce];
            int64_t index[kAtOnce];
            for (int j = 0; j < kAtOnce; ++j) {
                index[j] = first + (j < n ? j : 0);
                code[j] = table + index[j] * dim;
            }
            offer(&nearest, x + row * dim, code, index, n, dim, metric);
        }
        const bool none = nearest.index < 0;  // no cost is finite
        indices[row] = none ? 0 : nearest.index;
        if (margin == nullptr) continue;
        margin[row] = static_cast<float>(!none ? nearest.second - nearest.least : codes == 1 ? kInfinity : 0);
    }
}

}  // namespace metarec::METAREC_ISA
