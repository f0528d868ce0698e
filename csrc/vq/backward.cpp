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

inline void rotate_back(float* __restrict out, const float* g, const float* x, const float* q, float pull,
                        int64_t dim) {
    vfloat xx = {}, qq = {}, qg = {};
    for (int64_t d = 0; d < dim; d += kFloats) {
        const vfloat xd = load_first(x + d, dim - d), qd = load_first(q + d, dim - d), gd = load_first(g + d, dim - d);
        xx += xd * xd;
        qq += qd * qd;
        qg += qd * gd;
    }
    const float reach = __builtin_sqrtf(sum_lanes(xx)), code_reach = __builtin_sqrtf(sum_lanes(qq));
    const float length = reach > kEps ? reach : kEps, code_length = code_reach > kEps ? code_reach : kEps;
    const float scale = code_reach / length, to_u = 1 / length, to_v = 1 / code_length;
    // w = u + v from its elements: its square from the angle would cancel where x and the code are opposite
    vfloat ww = {}, wg = {};
    for (int64_t d = 0; d < dim; d += kFloats) {
        const vfloat w = load_first(x + d, dim - d) * to_u + load_first(q + d, dim - d) * to_v;
        ww += w * w;
        wg += w * load_first(g + d, dim - d);
    }
    const float square = sum_lanes(ww);
    const float along_w = -2 * scale * sum_lanes(wg) / (square > kEps * kEps ? square : kEps * kEps);
    const float along_u = 2 * scale * sum_lanes(qg) * to_v;
    combine(out, g, scale, x, (along_w + along_u) * to_u + pull, q, along_w * to_v - pull, dim);
}

}  // namespace

void vq_backward_f32(const float* grad, const float* grad_error, const float* x, const float* quantized, int64_t rows,
                     int64_t dim, bool rotation, float* out) {
#pragma omp parallel for schedule(static) if (rows * dim > 1 << 14)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * dim;
        const float pull = grad_error == nullptr ? 0 : 2 * grad_error[row];
        if (grad == nullptr) {
            if (pull == 0) {
                for (int64_t d = 0; d < dim; ++d) out[at + d] = 0;
            } else {
                difference(out + at, x + at, quantized + at, pull, dim);
            }
        } else if (rotation) {
            rotate_back(out + at, grad + at, x + at, quantized + at, pull, dim);
        } else if (pull == 0) {
            for (int64_t d = 0; d < dim; ++d) out[at + d] = grad[at + d];
        } else {
            straight(out + at, grad + at, x + at, quantized + at, pull, dim);
        }
    }
}

}  // namespace metarec::METAREC_ISA
