// A codebook made ready for the search: centred, without duplicate codes, interleaved for vector loads.
#pragma once

#include <cstdint>

namespace metarec {

// Beyond this squared norm, of a code or a row, sums of float32 products might overflow.
constexpr float kMaxSquare = 1e36f;

constexpr int64_t kMaxGroup = 8;

// Per head, slots count the distinct finite codes in the order of their indices, padded to whole panels. A panel holds
// `lanes` groups of `group` neighbouring slots; slot s of a panel lies in lane s / group of vector s % group.
struct Codebook {
    int64_t heads, codes, dim;
    int64_t group, lanes, panels;
    const float* original;      // [H, codes, dim]
    const float* mean;          // [H, dim], subtracted from codes and rows
    const int32_t* code;        // [H, panels * lanes * group] index of the slot's code; kMaxGroup more may be read
    const uint8_t* duplicated;  // [H, codes] whether a later code equals this one
    const int64_t* slots;       // [H]
};

// The slots in one precision: centred code c' = scale * integers (int8 plus 128, so unsigned) or float32 numbers.
struct Panels {
    uint32_t* words;  // [H, panels, group, words, lanes]: a word is four int8 or one float32 of a code
    float* start;     // [H, panels, group, lanes] -||code - mean||^2 / 2, -inf in padding
    float* bounds;    // [H, 4]: scale; most ||code - mean||; most ||code - mean - c'||; most start error, relative
    int64_t count;    // words of a code
};

}  // namespace metarec
