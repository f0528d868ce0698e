#pragma once

#include <cstdint>

#include "core/isa.h"

namespace metarec {

// What AdamW did while rows had no gradient; see metarec_fast/reference/missed_steps.py.
struct MissedSteps {
    const int64_t* ids;    // [rows] distinct, or null for rows 0, 1, ...
    int64_t* last;         // of every row of the table: the step at which it was up to date
    const double* past;    // [step - first + 1, 3 + terms]: lr, log keep, center, moments
    const double* shrink;  // [step - first + 1, 3]: what p, m and v keep since each step
    int64_t rows, width, first, step, terms, window;
    int64_t start;  // last touches before it are summed step by step
    double beta1, beta2, eps;
};

}  // namespace metarec

// Moves rows of p, m and v [V, width] in place to where `step` has them.
METAREC_KERNEL(void missed_steps_f32(const MissedSteps& missed, float* p, float* m, float* v))
METAREC_KERNEL(void missed_steps_f64(const MissedSteps& missed, double* p, double* m, double* v))
