#include "vq/prepared_codebook.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "vq/nearest_codeword.h"

namespace metarec {
namespace {

constexpr std::align_val_t kAlignment{64};

constexpr int kLanes = 4;  // independent chains, to hide the latency of each

// Equal codes hash equally (adding zero turns -0 into 0); 0 for a code with a NaN or an infinity.
uint64_t hash(const float* code, int64_t dim) {
    uint64_t lane[kLanes] = {1, 2, 3, 4};
    uint32_t infinite = 0;
    auto mix = [&](int64_t d, int j) {
        const float value = code[d] + 0.0f;
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        infinite |= (bits & 0x7F800000u) == 0x7F800000u;
        lane[j] = (lane[j] ^ bits) * 0x9E3779B97F4A7C15u;
        lane[j] ^= lane[j] >> 29;
    };
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
        for (int j = 0; j < kLanes; ++j) mix(d + j, j);
    }
    for (; d < dim; ++d) mix(d, 0);
    const uint64_t sum =
        ((lane[0] * 3 + lane[1]) * 0xBF58476D1CE4E5B9u) ^ ((lane[2] * 5 + lane[3]) * 0x94D049BB133111EBu);
    return infinite ? 0 : sum | 1;
}

// Distinct finite codes, each at its lowest index. Returns how many.
int64_t distinct_codes(const float* codes, const uint64_t* hashes, int64_t count, int64_t dim, int32_t* kept,
                       uint8_t* duplicated) {
    size_t capacity = 16;
    while (capacity < 2 * static_cast<size_t>(count)) capacity *= 2;
    std::vector<int32_t> table(capacity, -1);
    int64_t slots = 0;
    std::fill_n(duplicated, count, 0);
    for (int64_t k = 0; k < count; ++k) {
        const float* code = codes + k * dim;
        if (hashes[k] == 0) continue;
        size_t at = (hashes[k] >> 1) & (capacity - 1);
        auto differs = [&](int32_t other) {
            return hashes[other] != hashes[k] || !std::equal(code, code + dim, codes + other * dim);
        };
        while (table[at] >= 0 && differs(kept[table[at]])) at = (at + 1) & (capacity - 1);
        if (table[at] >= 0) {
            duplicated[kept[table[at]]] = 1;
            continue;
        }
        table[at] = static_cast<int32_t>(slots);
        kept[slots++] = static_cast<int32_t>(k);
    }
    return slots;
}

// Any centre gives exact codes; the mean of some gives small errors, and costs little.
constexpr int64_t kMeanOf = 512;

void mean_code(const float* codes, const int32_t* kept, int64_t slots, int64_t dim, float* mean) {
    std::vector<double> sum(dim, 0.0);
    const int64_t step = (slots + kMeanOf - 1) / kMeanOf;
    int64_t count = 0;
    for (int64_t s = 0; s < slots; s += step, ++count) {
        const float* code = codes + kept[s] * dim;
        for (int64_t d = 0; d < dim; ++d) sum[d] += code[d];
    }
    for (int64_t d = 0; d < dim; ++d) mean[d] = count > 0 ? static_cast<float>(sum[d] / static_cast<double>(count)) : 0;
}

// Codes of a group: small groups leave few distances to compute, large ones few maxima to compare. A panel of a few
// codes is mostly padding.
int64_t group_size(int64_t codes, int64_t dim, int64_t lanes) {
    if (codes <= 2 * lanes) return 2;
    return codes <= 512 || (dim > 16 && codes <= 4096) ? 4 : kMaxGroup;
}

// Lays arrays out one after the other, each on its own cache lines; with no base it only measures.
struct Arena {
    char* base;
    size_t used = 0;
    template <typename T>
    T* take(int64_t count) {
        T* at = reinterpret_cast<T*>(base + used);
        used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return base == nullptr ? nullptr : at;
    }
};

}  // namespace

void FreeAligned::operator()(void* memory) const { ::operator delete(memory, kAlignment); }

AlignedMemory allocate_aligned(size_t bytes) { return AlignedMemory(::operator new(bytes, kAlignment)); }

PreparedCodebook::PreparedCodebook(const float* codebook, int64_t heads, int64_t codes, int64_t dim, int64_t lanes) {
    const int64_t group = group_size(codes, dim, lanes), width = lanes * group;
    const int64_t panels = (codes + width - 1) / width, padded = panels * width;
    float* mean;
    int32_t* code;
    uint8_t* duplicated;
    int64_t* slots;
    auto lay_out = [&](char* memory) {
        Arena arena{memory};
        mean = arena.take<float>(heads * dim);
        code = arena.take<int32_t>(heads * padded + kMaxGroup);
        duplicated = arena.take<uint8_t>(heads * codes);
        slots = arena.take<int64_t>(heads);
        return arena.used;
    };
    memory_ = allocate_aligned(lay_out(nullptr));
    lay_out(static_cast<char*>(memory_.get()));
    view_ = {heads, codes, dim, group, lanes, panels, codebook, mean, code, duplicated, slots};

    std::vector<uint64_t> hashes(heads * codes);
#pragma omp parallel for schedule(static) if (heads * codes * dim > 1 << 15)
    for (int64_t k = 0; k < heads * codes; ++k) hashes[k] = hash(codebook + k * dim, dim);
#pragma omp parallel for schedule(dynamic) if (heads > 1 && heads * codes * dim > 1 << 15)
    for (int64_t h = 0; h < heads; ++h) {
        slots[h] = distinct_codes(codebook + h * codes * dim, hashes.data() + h * codes, codes, dim, code + h * padded,
                                  duplicated + h * codes);
        mean_code(codebook + h * codes * dim, code + h * padded, slots[h], dim, mean + h * dim);
    }
}

PreparedPanels::PreparedPanels(const Codebook& codebook, bool screen) {
    const int64_t slots = codebook.heads * codebook.panels * codebook.lanes * codebook.group;
    view_.count = METAREC_DISPATCH(panel_words)(codebook.dim, screen);
    auto lay_out = [&](char* memory) {
        Arena arena{memory};
        view_.words = arena.take<uint32_t>(slots * view_.count);
        view_.start = arena.take<float>(slots);
        view_.bounds = arena.take<float>(codebook.heads * 4);
        return arena.used;
    };
    memory_ = allocate_aligned(lay_out(nullptr));
    lay_out(static_cast<char*>(memory_.get()));
    METAREC_DISPATCH(pack_panels)(codebook, screen, view_);
}

}  // namespace metarec
