// What a search of the nearest codeword works with: its tile, its arguments, and the scratch memory of a thread.
#pragma once

#include "core/vec.h"
#include "vq/nearest_codeword/nearest_codeword.h"

namespace metarec::METAREC_ISA {
namespace {

// A tile of kRows x kVectors accumulators; the registers left hold kVectors of codes and a broadcast element of a row.
#if defined(METAREC_ISA_avx512)
constexpr int kRows = 12, kVectors = 2;
#elif defined(METAREC_ISA_avx2)
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

#if defined(__AVX512VNNI__)
constexpr bool kScreens = true;
#else
constexpr bool kScreens = false;
#endif
constexpr float kInfinity = __builtin_inff();
constexpr float kUnit = 0x1p-24f;

// Rows of a block: packed rows stay in L1 while one panel after the other passes over them; longer rows stay in L2,
// and more of them share each panel.
inline int64_t block_rows(int64_t words) { return words <= 32 || words > 128 ? 96 : 48; }

struct Search {
    const Codebook& codebook;
    const SearchRows& rows;
    const SearchOutput& out;
    const Unresolved* unresolved;
    bool products;
    int64_t limit;  // codes whose distances are worth computing before a search in float32 would be cheaper
};

// What a thread works with, carved from its scratch. Arrays of a block: [tiles, ...].
struct Workspace {
    uint32_t* words;        // [tiles, words, kRows]
    float* norm;            // [rows] at least ||X||
    float* rounding;        // [rows] at least ||X - x'||
    float* factor;          // [rows] scale of the integer sums
    int32_t* offset;        // [rows] what unsigned codes add to them, negated
    float* maxima;          // [rows, panels * lanes]
    float* error;           // [rows, panels], padded to whole vectors
    float* threshold;       // [rows] only groups that can reach it can contain the nearest code
    int32_t* candidates;    // [codes], padded
    float* cost;            // [codes], padded
    float* cluster_maxima;  // [kRows, groups of clusters] of one tile
    int64_t* cluster_tile;  // [clusters] the tile whose maxima they are
    int32_t* expanded;      // [clusters] to be searched for one row
    int64_t size;
};

inline int64_t padded_panels(const Codebook& codebook) { return (codebook.panels + kFloats - 1) / kFloats * kFloats; }

inline Workspace carve(char* memory, const Codebook& codebook) {
    int64_t used = 0;
    auto take = [&](int64_t elements) {
        char* at = memory + used;
        used += (elements * 4 + 63) / 64 * 64;
        return at;
    };
    const int64_t block = block_rows(codebook.words);
    Workspace w;
    w.words = reinterpret_cast<uint32_t*>(take(block * codebook.words));
    w.norm = reinterpret_cast<float*>(take(block));
    w.rounding = reinterpret_cast<float*>(take(block));
    w.factor = reinterpret_cast<float*>(take(block));
    w.offset = reinterpret_cast<int32_t*>(take(block));
    w.maxima = reinterpret_cast<float*>(take(block * codebook.panels * kFloats));
    w.error = reinterpret_cast<float*>(take(block * padded_panels(codebook)));
    w.threshold = reinterpret_cast<float*>(take(block));
    w.candidates = reinterpret_cast<int32_t*>(take(codebook.codes + kMaxGroup));
    w.cost = reinterpret_cast<float*>(take(codebook.codes + 4 + kFloats));
    w.cluster_maxima = reinterpret_cast<float*>(take(kRows * codebook.clusters.groups));
    w.cluster_tile = reinterpret_cast<int64_t*>(take(2 * codebook.clusters.most));
    w.expanded = reinterpret_cast<int32_t*>(take(codebook.clusters.most));
    w.size = used;
    return w;
}

inline int64_t used_panels(const Codebook& codebook, int64_t h) {
    const int64_t width = codebook.lanes * codebook.group;
    return (codebook.slots[h] + width - 1) / width;
}

}  // namespace
}  // namespace metarec::METAREC_ISA
