#pragma once

#include <cstdint>

#include "core/isa.h"

// Softmax cross-entropy over the items of a table, tile by tile: no [T, V] tensor exists at any time.
//
// logits[t, v] = <h[t], table[v]> + bias[v];  lse[t] = log sum_v exp(logits[t, v]);  loss[t] = lse[t] - logits[t,
// target]
//
// h is [T, D], table [V, D], bias [V] or null, targets [T] in [0, V). Results do not depend on the number of threads.
// scratch: linear_cross_entropy_scratch(...) floats, aligned to 64 bytes.

METAREC_KERNEL(int64_t linear_cross_entropy_scratch(int64_t T, int64_t V, int64_t D))
METAREC_KERNEL(void linear_cross_entropy_forward(const float* h, const float* table, const int64_t* targets,
                                                 const float* bias, float* loss, float* lse, float* scratch, int64_t T,
                                                 int64_t V, int64_t D))
// The gradients of sum_t grad[t] * loss[t]. A null output is not computed; rows of zero grad cost nothing.
METAREC_KERNEL(void linear_cross_entropy_backward(const float* grad, const float* h, const float* table,
                                                  const int64_t* targets, const float* bias, const float* lse,
                                                  float* grad_h, float* grad_table, float* grad_bias, float* scratch,
                                                  int64_t T, int64_t V, int64_t D))
// The gradients of <u, grad_h> + <w, grad_table> + <c, grad_bias>, the outputs of the backward pass, in its inputs
// grad, h, table and bias. A null u, w or c is zero; a null output is not computed.
METAREC_KERNEL(void linear_cross_entropy_double_backward(
    const float* grad, const float* h, const float* table, const int64_t* targets, const float* bias, const float* lse,
    const float* u, const float* w, const float* c, float* grad_grad, float* grad_h, float* grad_table,
    float* grad_bias, float* scratch, int64_t T, int64_t V, int64_t D))
