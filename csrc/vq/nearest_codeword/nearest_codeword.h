#pragma once

#include <cstdint>

#include "core/isa.h"
#include "vq/nearest_codeword/codebook.h"

namespace metarec {

// Arrays that a search fills, each [H, rows] or [H, rows, dim]; a null pointer is not wanted.
struct SearchOutput {
    int64_t* indices;
    float* margin;  // [H, ceil(rows / margin_every)] of the first of so many rows
    int64_t margin_every;
    float* quantized;
    float* row_error;
    // [1] is raised by the rows that the first pass did not decide. Where it gives up, how many it had tried by then
    // depends on the timing of threads; nothing else does.
    int64_t* rechecked;
};

// Rows of x [H, rows, dim] to search: all, or those listed for each head.
struct SearchRows {
    const float* x;
    int64_t rows;
    const int64_t* listed;  // [H, rows], null for all
    const int64_t* count;   // [H] rows listed
};

// Rows that a screen in low precision left to a search in float32.
struct Unresolved {
    int64_t* rows;   // [H, rows]
    int64_t* count;  // [H]
};

}  // namespace metarec

METAREC_KERNEL(int64_t codebook_lanes())
// Bits of the integers in which vectors of dim elements are screened first; 32: float32 decides at once.
METAREC_KERNEL(int screen_bits(int64_t dim))
METAREC_KERNEL(void measure_codes(const Codebook& codebook, float* squares))  // ||code - mean||^2 of every slot's code
METAREC_KERNEL(void pack_codebook(const Codebook& codebook))                  // fills scan, its bounds, and clusters
METAREC_KERNEL(int64_t search_scratch(const Codebook& codebook))              // bytes that each thread needs
// For each row the nearest code of its head; scratch holds threads * search_scratch() bytes. A codebook of integers
// screens: rows with too many codes left are listed in unresolved instead of being decided.
METAREC_KERNEL(void nearest_codeword_f32(const Codebook& codebook, const SearchRows& rows, int threads, void* scratch,
                                         const SearchOutput& out, const Unresolved* unresolved))
