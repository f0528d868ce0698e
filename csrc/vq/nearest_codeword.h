#pragma once

#include <cstdint>

#include "core/isa.h"
#include "vq/codebook.h"

namespace metarec {

// Arrays that a search fills, each [H, rows] or [H, rows, dim]; a null pointer is not wanted.
struct SearchOutput {
    int64_t* indices;
    float* margin;
    float* quantized;
    float* row_error;
};

}  // namespace metarec

METAREC_KERNEL(int64_t codebook_width())
METAREC_KERNEL(int64_t search_scratch(int64_t dim))  // floats that each thread needs
// For each row of x [H, rows, dim] the nearest code of its head; scratch holds threads * search_scratch(dim) floats.
METAREC_KERNEL(void nearest_codeword_f32(const Codebook& codebook, const float* x, int64_t rows, int threads,
                                         float* scratch, const SearchOutput& out))
