// A codebook made ready for the search: centred, without duplicate codes, interleaved for vector loads.
#pragma once

#include <cstdint>

#include "vq/exact.h"

namespace metarec {

// Beyond this squared norm, of a code or a row, sums of float32 products might overflow.
constexpr float kMaxSquare = 1e36f;
constexpr int64_t kMaxGroup = 8;

// Vectors packed for the scan, in panels of lanes * group slots: slot s of a panel lies in lane s / group of vector
// s % group, so that a group of neighbouring slots shares a lane.
struct Panels {
    uint32_t* words;  // [panels, group, count, lanes]: a word is one float32 of a vector, two int16, or four int8 + 128
    float* start;     // [panels, group, lanes] what is added to products: -inf in padding
    float* scale;     // [panels] of the integers
};

// Near-duplicate codes, at least kLeastCluster together, enter the scan as one slot: the first of them. A row for which
// that slot is a candidate is compared with the members by their differences from the first, which float32 resolves.
constexpr int64_t kLeastCluster = 16;
constexpr int64_t kClusterGroup = 2;
struct Clusters {
    int32_t* of_code;  // [H, codes] the cluster that a code represents, -1 for none
    int64_t* first;    // [H, clusters + 1] where the members of a cluster begin
    int64_t* panel;    // [H, clusters] its first panel
    float* radius;     // [H, clusters] at least the distance of any member from the first
    int32_t* members;  // [H, codes] codes, ascending in each cluster
    Panels panels;     // of differences, group kClusterGroup
    int64_t most;      // most clusters of a head, the stride of the arrays over clusters
    int64_t groups;    // groups of all clusters of a head
};

// Slots are the distinct finite codes that enter the scan: single ones, clusters, and last those of large norm,
// each in the order of their indices.
struct Codebook {
    Metric metric;
    int64_t heads, codes, dim;
    int bits;  // of the numbers in the panels of the scan: 8 and 16 are integers, 32 is float32
    int64_t group, lanes, panels, words;
    const float* original;  // [H, codes, dim]
    float* mean;            // [H, dim], subtracted from codes and rows
    int32_t* code;          // [H, panels * lanes * group] index of the slot's code; kMaxGroup more may be read
    uint8_t* duplicated;    // [H, codes] whether a later code equals this one
    int64_t* slots;         // [H]
    Panels scan;            // of [H, panels]; start is -||code - mean||^2 / 2, for products (code - mean).mean
    // The score of any slot of a panel errs by at most by_rounding * ||x - x'|| + by_norm * ||x|| + constant,
    // x being a row minus the mean and x' what stands for it in the scan (nearest_codeword.cpp).
    float *by_rounding, *by_norm, *constant;  // [H, panels], padded to whole vectors
    float* reach;                             // [H] at least ||code - mean|| of any slot
    float* length;                            // [H, codes] for products: at least ||code|| of the slots
    float* one_length;                        // [H] for products: the most of these if they are much alike, else 0
    float* mean_length;                       // [H] for products: at least ||mean||
    Clusters clusters;
};

}  // namespace metarec
