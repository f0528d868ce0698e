#pragma once

#include <cstdint>

#include "core/isa.h"

namespace metarec {

// What is remembered of the rows of a table and of the codes between two lookups; see bounded_lookup.cpp.
struct RowBounds {
    int64_t heads, rows, codes, dim, list;  // list: codes remembered by name for each row, at most codes

    // of each row, [H, rows, ...], since the last time it was searched in full
    float* anchor;                  // [dim] the row then
    int32_t* code;                  // [list] its nearest codes then, nearest first
    float* key;                     // [list] at most their distance + path
    float* rest;                    // at most the distance of every other code + sweep
    float* upper;                   // at least the distance of code[0] - its path
    int64_t* version;               // of the codebook then; -1: never searched
    float *visits, *spent;          // lookups since then, and the distances that they and the search cost

    // of the codes
    double* path;                   // [H, codes] how far a code has travelled in all
    double* sweep;                  // [H] sum over the versions of the longest step, jumps left out
    int64_t* jumped;                // [H, codes] version of a code's last jump, 0 if none
    int32_t* recent;                // [H, codes] the codes that ever jumped, latest first ...
    int64_t* recent_count;          // [H] ... and their number
    float* previous;                // [H, codes, dim] the codebook at the last lookup
};

}  // namespace metarec

// drift[h, k]: at least how far a code is from its place in bounds.previous. False if a code is not finite.
METAREC_KERNEL(bool code_drift(const RowBounds& bounds, const float* codebook, double* drift))
// Scratch for one thread, in doubles.
METAREC_KERNEL(int64_t bounded_lookup_scratch(const RowBounds& bounds))
// The nearest code of rows x [H, count, dim], which are the rows `ids` of the table; -1 where a search with another
// referee has to decide. transposed: the codebook as [H, dim, codes]. version: of the codebook. Adds the distances that
// were computed to *evaluations.
METAREC_KERNEL(void bounded_lookup(const RowBounds& bounds, const int64_t* ids, const float* x, const float* codebook,
                                   const float* transposed, int64_t count, int64_t version, int threads,
                                   double* scratch, int64_t* indices, int64_t* evaluations))
