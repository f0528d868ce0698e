// A codebook made ready for the search: centred, without duplicate codes, interleaved for vector loads.
#pragma once

#include <cstdint>

namespace metarec {

// Beyond this squared norm, of a code or a row, sums of float32 products might overflow.
constexpr float kMaxSquare = 1e36f;

// Per head h, slots s count the distinct finite codes in the order of their indices, padded to whole panels.
struct Codebook {
    int64_t heads, codes, dim, width, panels;  // width: slots of a panel
    const float* original;                     // [H, codes, dim]
    const float* mean;                         // [H, dim], subtracted from codes and rows
    const float* packed;                       // [H, panels, dim, width] codes - mean
    const float* start;                        // [H, panels * width] -||code - mean||^2 / 2, -inf in padding
    // score error of a slot against a row x: error_slope * ||x - mean|| + error_base (see nearest_codeword.cpp)
    const float *error_slope, *error_base;          // [H, panels * width]
    const float *max_error_slope, *max_error_base;  // [H]
    const int32_t* code;                            // [H, panels * width] index of the slot's code
    const uint8_t* duplicated;                      // [H, codes] whether a later code equals this one
    const int64_t* slots;                           // [H]
};

}  // namespace metarec
