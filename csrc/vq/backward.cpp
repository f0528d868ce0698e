#include "vq/backward.h"

#include "core/vec.h"

namespace metarec::METAREC_ISA {
namespace {

constexpr float kEps = 1e-6f;  // least length by which a vector is divided

// out = a * g + b * x + c * q
inline void combine(float* __restrict out, const float* g, float a, const float* x, float b, const float* q, float c,
                    int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) out[d] = a * g[d] + (b * x[d] + c * q[d]);
}

inline void straight(float* __restrict out, const float* g, const float* x, const float* q, float pull, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) out[d] = g[d] + pull * (x[d] - q[d]);
}

inline void difference(float* __restrict out, const float* x, const float* q, float pull, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) out[d] = pull * (x[d] - q[d]);
}

// kAtOnce rows, to hide the latency of their norms; a row beyond the last repeats the first.
constexpr int kAtOnce = 4;

inline void rotate_back(const float* grad, const float* x, const float* quantized, const float* pull, int64_t rows,
                        int64_t dim, float* out) {
    const float *g[kAtOnce], *r[kAtOnce], *q[kAtOnce];
    vfloat xx[kAtOnce] = {}, qq[kAtOnce] = {}, qg[kAtOnce] = {}, ww[kAtOnce] = {}, wg[kAtOnce] = {};
    for (int j = 0; j < kAtOnce; ++j) {
        const int64_t at = (j < rows ? j : 0) * dim;
        g[j] = grad + at;
        r[j] = x + at;
        q[j] = quantized + at;
    }
    for (int64_t d = 0; d < dim; d += kFloats) {
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j) {
            const vfloat xd = load_first(r[j] + d, dim - d), qd = load_first(q[j] + d, dim - d);
            xx[j] += xd * xd;
            qq[j] += qd * qd;
            qg[j] += qd * load_first(g[j] + d, dim - d);
        }
    }
    float square[kAtOnce], code_square[kAtOnce], along_code[kAtOnce];
    sum_lanes(xx, square);
    sum_lanes(qq, code_square);
    sum_lanes(qg, along_code);
    float scale[kAtOnce], to_u[kAtOnce], to_v[kAtOnce];
    for (int j = 0; j < kAtOnce; ++j) {
        const float length = __builtin_sqrtf(square[j]), code_length = __builtin_sqrtf(code_square[j]);
        to_u[j] = 1 / (length > kEps ? length : kEps);
        to_v[j] = 1 / (code_length > kEps ? code_length : kEps);
        scale[j] = code_length * to_u[j];
    }
    // w = u + v from its elements: its square from the angle would cancel where x and the code are opposite
    for (int64_t d = 0; d < dim; d += kFloats) {
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j) {
            const vfloat w = load_first(r[j] + d, dim - d) * to_u[j] + load_first(q[j] + d, dim - d) * to_v[j];
            ww[j] += w * w;
            wg[j] += w * load_first(g[j] + d, dim - d);
        }
    }
    float w_square[kAtOnce], along[kAtOnce];
    sum_lanes(ww, w_square);
    sum_lanes(wg, along);
    for (int j = 0; j < kAtOnce && j < rows; ++j) {
        const float least = kEps * kEps,
                    along_w = -2 * scale[j] * along[j] / (w_square[j] > least ? w_square[j] : least);
        const float along_u = 2 * scale[j] * along_code[j] * to_v[j];
        combine(out + j * dim, g[j], scale[j], r[j], (along_w + along_u) * to_u[j] + pull[j], q[j],
                along_w * to_v[j] - pull[j], dim);
    }
}

}  // namespace

void vq_backward_f32(const float* grad, const float* grad_error, const float* x, const float* quantized, int64_t rows,
                     int64_t dim, bool rotation, float* out) {
#pragma omp parallel for schedule(static) if (rows * dim > 1 << 14)
    for (int64_t first = 0; first < rows; first += kAtOnce) {
        const int64_t count = rows - first < kAtOnce ? rows - first : kAtOnce;
        float pull[kAtOnce];
        for (int j = 0; j < kAtOnce; ++j) pull[j] = grad_error == nullptr || j >= count ? 0 : 2 * grad_error[first + j];
        if (grad != nullptr && rotation) {
            const int64_t at = first * dim;
            rotate_back(grad + at, x + at, quantized + at, pull, count, dim, out + at);
            continue;
        }
        for (int64_t j = 0; j < count; ++j) {
            const int64_t at = (first + j) * dim;
            if (grad == nullptr && pull[j] == 0) {
                for (int64_t d = 0; d < dim; ++d) out[at + d] = 0;
            } else if (grad == nullptr) {
                difference(out + at, x + at, quantized + at, pull[j], dim);
            } else if (pull[j] == 0) {
                for (int64_t d = 0; d < dim; ++d) out[at + d] = grad[at + d];
            } else {
                straight(out + at, grad + at, x + at, quantized + at, pull[j], dim);
            }
        }
    }
}

}  // namespace metarec::METAREC_ISA
