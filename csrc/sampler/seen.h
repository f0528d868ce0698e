// What negatives must avoid and what they are drawn from, prepared once: each user's distinct items, alias cells.
#pragma once

#include <cstdint>

#include "sampler/windows.h"

namespace metarec {

// offsets[b + 1] - offsets[b] = number of row b's events: room for its distinct items.
void row_lengths(const Sequences& data, const int64_t* users, int64_t rows, int64_t* offsets);

// Row b's distinct items in rising order at out + offsets[b], their number in counts[b]. out is int64 if wide, else
// int32. Returns the lowest row that holds an item outside [0, num_items), or -1.
int64_t sorted_items(const Sequences& data, const int64_t* users, int64_t rows, int64_t num_items, bool wide,
                     const int64_t* offsets, void* out, int64_t* counts);

// weights[b] = weight of row b's distinct items, which are int32; cumulative[i] = weight of the items before i.
void row_weights(const int64_t* offsets, const int64_t* counts, const int32_t* seen, int64_t rows,
                 const int64_t* cumulative, int64_t* weights);

// One column of an alias table: the item itself if a random word is below threshold, else its alias.
struct AliasCell {
    uint32_t threshold, alias;
    float log_p[2];  // of the item, of its alias
};

constexpr uint64_t kCapacity = uint64_t(1) << 32;  // weight of one cell

// weights: positive or 0, summing to size * kCapacity. Writes threshold and alias alone. False if the sum is another.
bool build_alias(const int64_t* weights, int64_t size, AliasCell* cells);

}  // namespace metarec
