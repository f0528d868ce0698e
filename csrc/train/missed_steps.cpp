#include "train/missed_steps.h"

#include <math.h>

namespace metarec::METAREC_ISA {
namespace {

constexpr int64_t kBlock = 64;  // elements whose sums are held at once

template <typename T>
inline T root(T x) {
    return sizeof(T) == 4 ? static_cast<T>(sqrtf(static_cast<float>(x))) : static_cast<T>(sqrt(x));
}

// sum[i] = sum_k W_k / (s[i] + eps e_k) by the series.
template <typename T>
inline void by_series(const double* then, int64_t terms, double eps, const T* __restrict s, T* __restrict sum,
                      int64_t count) {
    T inverse[kBlock], z[kBlock];
    const T shift = static_cast<T>(eps * then[2]), highest = static_cast<T>(then[2 + terms]);
    for (int64_t i = 0; i < count; ++i) {
        inverse[i] = 1 / (s[i] + shift);
        z[i] = -shift * inverse[i];
        sum[i] = highest;
    }
    for (int64_t j = terms - 2; j >= 0; --j) {
        const T moment = static_cast<T>(then[3 + j]);
        for (int64_t i = 0; i < count; ++i) sum[i] = sum[i] * z[i] + moment;
    }
    for (int64_t i = 0; i < count; ++i) sum[i] *= inverse[i];
}

// The same, step by step.
template <typename T>
inline void one_by_one(const MissedSteps& missed, int64_t last, const T* __restrict s, T* __restrict sum,
                       int64_t count) {
    const int64_t columns = 3 + missed.terms;
    const double* then = missed.past + (last - missed.first) * columns;
    const int64_t steps = missed.step - last < missed.window ? missed.step - last : missed.window;
    for (int64_t i = 0; i < count; ++i) sum[i] = 0;
    // beta1^k and q^k, and with `last` for k in the exponent what the bias corrections lack of one
    const double q = sqrt(missed.beta2);
    double first = 1, second = 1;
    double lacks_first = pow(missed.beta1, static_cast<double>(last));
    double lacks_second = pow(missed.beta2, static_cast<double>(last));
    for (int64_t k = 1; k <= steps; ++k) {
        first *= missed.beta1, second *= q, lacks_first *= missed.beta1, lacks_second *= missed.beta2;
        const double* now = then + k * columns;
        const double e = sqrt(1 - lacks_second) / second;
        const double share = now[0] * e * first / (1 - lacks_first);
        const T weight = static_cast<T>(share * exp(then[1] - now[1])), shift = static_cast<T>(missed.eps * e);
        for (int64_t i = 0; i < count; ++i) sum[i] += weight / (s[i] + shift);
    }
}

template <typename T>
inline void move_rows(const MissedSteps& missed, T* p, T* m, T* v) {
    const int64_t columns = 3 + missed.terms;
#pragma omp parallel for schedule(dynamic, 64) if (missed.rows * missed.width > 65536)
    for (int64_t row = 0; row < missed.rows; ++row) {
        const int64_t id = missed.ids == nullptr ? row : missed.ids[row];
        const int64_t last = missed.last[id];
        if (last == missed.step) continue;
        missed.last[id] = missed.step;
        const double* then = missed.past + (last - missed.first) * columns;
        const double* shrink = missed.shrink + 3 * (last - missed.first);
        const T keep = static_cast<T>(shrink[0]);
        const T shrink_m = static_cast<T>(shrink[1]), shrink_v = static_cast<T>(shrink[2]);
        for (int64_t begin = 0; begin < missed.width; begin += kBlock) {
            const int64_t size = missed.width - begin < kBlock ? missed.width - begin : kBlock;
            T* __restrict p_row = p + id * missed.width + begin;
            T* __restrict m_row = m + id * missed.width + begin;
            T* __restrict v_row = v + id * missed.width + begin;
            T s[kBlock], sum[kBlock];
            int any = 0;
            for (int64_t i = 0; i < size; ++i) any |= (m_row[i] != 0) | (v_row[i] != 0);
            if (any == 0) {  // no gradient so far
                for (int64_t i = 0; i < size; ++i) p_row[i] *= keep;
                continue;
            }
            for (int64_t i = 0; i < size; ++i) s[i] = root(v_row[i]);
            if (last >= missed.start) {
                by_series(then, missed.terms, missed.eps, s, sum, size);
            } else {
                one_by_one(missed, last, s, sum, size);
            }
            for (int64_t i = 0; i < size; ++i) {
                p_row[i] = keep * (p_row[i] - m_row[i] * sum[i]);
                m_row[i] *= shrink_m;
                v_row[i] *= shrink_v;
            }
        }
    }
}

}  // namespace

void missed_steps_f32(const MissedSteps& missed, float* p, float* m, float* v) { move_rows(missed, p, m, v); }
void missed_steps_f64(const MissedSteps& missed, double* p, double* m, double* v) { move_rows(missed, p, m, v); }

}  // namespace metarec::METAREC_ISA
