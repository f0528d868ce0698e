#pragma once

#include <cstdint>

#include "core/isa.h"

// Gradient to x [rows, dim]: what `grad` [rows, dim] of the quantized rows passes on, plus 2 (x - quantized) times
// `grad_error` [rows] of the squared error. Either may be null. rotation: through s R (reference/vq_backward.py);
// else straight through. A row whose grad_error is 0 may hold NaN or infinity.
METAREC_KERNEL(void vq_backward_f32(const float* grad, const float* grad_error, const float* x, const float* quantized,
                                    int64_t rows, int64_t dim, bool rotation, float* out))
