#pragma once

#include <cstdint>

#include "core/isa.h"
#include "sampler/philox.h"
#include "sampler/seen.h"

namespace metarec {

// Row b draws (segments[b + 1] - segments[b]) * count negatives for user users[b], into negatives and logq from
// segments[b] * count on. seen + seen_offsets[u], seen_counts[u] of them: the user's distinct items in rising order,
// int64 if wide, else int32; fewer than num_items of them.
struct NegativeRows {
    const int64_t* users;
    const int64_t* segments;
    int64_t rows, first_row, count, num_items;
    const int64_t* seen_offsets;
    const int64_t* seen_counts;
    const void* seen;
    bool wide;
    Randomness random;
    int64_t* negatives;
    float* logq;
};

// cells[V]; cumulative[V + 1]: weight of the items before i; seen_weights[U]: weight of what the user has seen.
struct Popularity {
    const AliasCell* cells;
    const int64_t* cumulative;
    const int64_t* seen_weights;
};

}  // namespace metarec

METAREC_KERNEL(void uniform_negatives(const NegativeRows& in))
METAREC_KERNEL(void popular_negatives(const NegativeRows& in, const Popularity& popularity))
