// A codebook made ready for the search: centred, without duplicate codes, interleaved for vector loads.
#pragma once

#include <cstdint>

namespace metarec {

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

// Owns the arrays of a Codebook.
class PreparedCodebook {
  public:
    PreparedCodebook(const float* codebook, int64_t heads, int64_t codes, int64_t dim, int64_t width);
    ~PreparedCodebook();
    PreparedCodebook(const PreparedCodebook&) = delete;
    PreparedCodebook& operator=(const PreparedCodebook&) = delete;
    const Codebook& view() const { return view_; }

  private:
    Codebook view_;
    void* memory_;
};

}  // namespace metarec
