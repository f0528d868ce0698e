#pragma once

#include <cstdint>

#include "core/isa.h"

// Softmax cross-entropy over the items of a table, tile by tile: no [T, V] tensor exists at any time.
//
// logits[t, v] = <h[t], table[v]> + bias[v];  lse[t] = log sum_v exp(logits[t, v]);
// loss[t] = lse[t] - logits[t, targets[t]], or 0 and without any gradient where targets[t] is `ignored`.
//
// Results do not depend on the number of threads. scratch: linear_cross_entropy_scratch(...) floats, aligned to 64
// bytes.

namespace metarec {

struct LinearLogits {
    const float* h;          // [T, D]
    const float* table;      // [V, D]
    const int64_t* targets;  // [T], in [0, V) or `ignored`
    const float* bias;       // [V], or null
    int64_t T, V, D, ignored;
};

// One array for each input of the logits, in its shape, or null: a gradient that is not needed, a cotangent of zero.
struct LinearGradients {
    float *h, *table, *bias;
};

enum class LinearPass { forward, backward, sum, double_backward };

}  // namespace metarec

METAREC_KERNEL(int64_t linear_cross_entropy_scratch(const LinearLogits& x, LinearPass pass))
METAREC_KERNEL(void linear_cross_entropy_forward(const LinearLogits& x, float* loss, float* lse, float* scratch))
// The gradients of sum_t grad[t] * loss[t]; rows of zero grad cost nothing.
METAREC_KERNEL(void linear_cross_entropy_backward(const LinearLogits& x, const float* lse, const float* grad,
                                                  const LinearGradients& out, float* scratch))
// total = sum_t weight[t] * loss[t] with its gradients at once. Logits are computed once instead of twice where the
// exponentials of a block of rows find room in a few megabytes.
METAREC_KERNEL(void linear_cross_entropy_sum(const LinearLogits& x, const float* weight, float* total, float* loss,
                                             float* lse, const LinearGradients& out, float* scratch))
// The gradients of <by.h, out.h> + <by.table, out.table> + <by.bias, out.bias>, out being what the backward pass gives,
// in grad and in the logits' inputs.
METAREC_KERNEL(void linear_cross_entropy_double_backward(const LinearLogits& x, const float* lse, const float* grad,
                                                         const LinearGradients& by, float* grad_grad,
                                                         const LinearGradients& out, float* scratch))
