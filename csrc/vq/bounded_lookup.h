#pragma once

#include <cstdint>

#include "core/isa.h"

namespace metarec {

// Head of a row's record; dim floats of `anchor`, `list` floats of `key` and `list` int32 of `code` follow.
struct RowRecord {
    int32_t version;      // of the codebook when the row was last searched in full; -1: never
    int32_t listed;       // codes with bounds of their own, code[0] the nearest then
    float rest;           // at most the distance of every other code then + sweep
    float upper;          // at least the distance of code[0] then - its path
    float visits, spent;  // lookups since then, that one included, and the distances that they cost
    // float anchor[dim];  // the row then
    // float key[list];    // at most the distance of code[j] then + its path
    // int32_t code[list];
};

// The state of the rows of a table and of the codes between two lookups; see bounded_lookup.cpp.
struct RowBounds {
    int64_t heads, rows, codes, dim, list;
    int32_t* records;       // [rows, H, 6 + dim + 2 * list]
    double* path;           // [H, codes] how far a code has travelled in all
    double* sweep;          // [H] sum over the versions of the longest step, jumps left out
    int32_t* jumped;        // [H, codes] version of a code's last jump, 0 if none
    int32_t* recent;        // [H, codes] the codes that ever jumped, latest first ...
    int64_t* recent_count;  // [H] ... and their number
    float* previous;        // [H, codes, dim] the codebook at the last lookup
};

// What a lookup took: distances computed; rows whose code the bounds alone name; rows searched in full, and how many of
// these although they had bounds.
struct Work {
    int64_t distances, proven, searched, failed;
};

}  // namespace metarec

// drift[h, k]: at least how far a code is from its place in bounds.previous. False if a code is not finite.
METAREC_KERNEL(bool code_drift(const RowBounds& bounds, const float* codebook, double* drift))
// The nearest code of rows x [H, count, dim], which are the rows `ids` of the table, where the bounds can tell; -1
// where only the definition can, -2 where a full search is needed. version: of the codebook. Returns how many are -2.
METAREC_KERNEL(int64_t lookup_by_bounds(const RowBounds& bounds, const int64_t* ids, const float* x,
                                        const float* codebook, int64_t count, int64_t version, int threads,
                                        double* scratch, int64_t* indices, Work* work))
// Replaces each -2 by an index or -1 and starts the bounds of these rows anew. packed: room for the codebook, heads *
// packed_codes(codes) * dim.
METAREC_KERNEL(void search_the_rest(const RowBounds& bounds, const int64_t* ids, const float* x, const float* codebook,
                                    int64_t count, int64_t version, int threads, float* packed, double* scratch,
                                    int64_t* indices, Work* work))
METAREC_KERNEL(int64_t packed_codes(int64_t codes))
// Scratch of both for each thread, in doubles.
METAREC_KERNEL(int64_t bounded_lookup_scratch(const RowBounds& bounds))
