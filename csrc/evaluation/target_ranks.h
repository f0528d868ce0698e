#pragma once

#include <cstdint>

#include "core/isa.h"

// Where targets rank among the items of a table, by counts: no score is ever stored.
//
// score[b, v] = bias[v] + h[b, 0] table[v, 0] + h[b, 1] table[v, 1] + ..., added in this order, each product and sum
// with one rounding where the instruction set fuses them (AVX2, AVX-512), with two where it does not (baseline x86-64).
// So a score is a function of its row of h, its item and nothing else: not of tiles, threads or the other rows.

namespace metarec {

// CSR over the cases: those of case b are offsets[b] to offsets[b + 1].
struct ItemLists {
    const int64_t* offsets;
    const int64_t* items;
};

template <typename T>
struct RankProblem {
    const T* h;              // [B, D]
    const T* table;          // [V, D]
    const T* bias;           // [V] or null
    const int64_t* targets;  // [B]
    ItemLists seen;          // no candidates; repeats count once, the target stays in. offsets null: none
    ItemLists added;         // items with a term of their own, rising in each case. offsets null: none
    const T* added_terms;    // score[b, v] + term, with one more rounding
    int64_t B, V, D;
};

// [B] each. Candidates that score above the target; exactly as the target, which is left out; items whose score is NaN
// or infinite, candidates or not: where there are any, the other two mean nothing.
struct RankCounts {
    int64_t* greater;
    int64_t* equal;
    int64_t* nonfinite;
};

}  // namespace metarec

METAREC_KERNEL(int64_t target_ranks_scratch(int64_t V, int64_t D))  // bytes for one thread, aligned to 64
METAREC_KERNEL(void target_ranks_f32(const RankProblem<float>& problem, const RankCounts& counts, int threads,
                                     void* scratch))
METAREC_KERNEL(void target_ranks_f64(const RankProblem<double>& problem, const RankCounts& counts, int threads,
                                     void* scratch))
