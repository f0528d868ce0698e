#include "vq/prepared_codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

namespace metarec {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

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

void mean_code(const float* codes, const int32_t* kept, int64_t slots, int64_t dim, float* mean) {
    std::vector<double> sum(dim, 0.0);
    for (int64_t s = 0; s < slots; ++s) {
        const float* code = codes + kept[s] * dim;
        for (int64_t d = 0; d < dim; ++d) sum[d] += code[d];
    }
    for (int64_t d = 0; d < dim; ++d) mean[d] = slots > 0 ? static_cast<float>(sum[d] / static_cast<double>(slots)) : 0;
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

PreparedCodebook::PreparedCodebook(const float* codebook, int64_t heads, int64_t codes, int64_t dim, int64_t width) {
    const int64_t panels = (codes + width - 1) / width, padded = panels * width;
    float *mean, *packed, *start, *slope, *base, *max_slope, *max_base;
    int32_t* code;
    uint8_t* duplicated;
    int64_t* slots;
    auto lay_out = [&](char* memory) {
        Arena arena{memory};
        mean = arena.take<float>(heads * dim);
        packed = arena.take<float>(heads * padded * dim);
        start = arena.take<float>(heads * padded);
        slope = arena.take<float>(heads * padded);
        base = arena.take<float>(heads * padded);
        max_slope = arena.take<float>(heads);
        max_base = arena.take<float>(heads);
        code = arena.take<int32_t>(heads * padded);
        duplicated = arena.take<uint8_t>(heads * codes);
        slots = arena.take<int64_t>(heads);
        return arena.used;
    };
    memory_.reset(::operator new(lay_out(nullptr), kAlignment));
    lay_out(static_cast<char*>(memory_.get()));
    view_ = {heads, codes, dim,  width,     panels,   codebook, mean,       packed,
             start, slope, base, max_slope, max_base, code,     duplicated, slots};

    std::vector<uint64_t> hashes(heads * codes);
#pragma omp parallel for schedule(static) if (heads * codes * dim > 1 << 15)
    for (int64_t k = 0; k < heads * codes; ++k) hashes[k] = hash(codebook + k * dim, dim);
#pragma omp parallel for schedule(dynamic) if (heads > 1 && heads * codes * dim > 1 << 15)
    for (int64_t h = 0; h < heads; ++h) {
        slots[h] = distinct_codes(codebook + h * codes * dim, hashes.data() + h * codes, codes, dim, code + h * padded,
                                  duplicated + h * codes);
        mean_code(codebook + h * codes * dim, code + h * padded, slots[h], dim, mean + h * dim);
    }

    // Relative to ||x'|| ||c'|| + ||c||^2 / 2: see the derivation in nearest_codeword.cpp
    const double n = static_cast<double>(dim);
    const double relative = (n + 6) * 0x1p-24 * (1 + n * 0x1p-22), absolute = (n + 2) * 0x1p-125;
#pragma omp parallel for schedule(static) if (heads * padded * dim > 1 << 15)
    for (int64_t panel = 0; panel < heads * panels; ++panel) {
        const int64_t h = panel / panels, first = panel % panels * width;
        const float* centre = mean + h * dim;
        float* out = packed + panel * dim * width;
        for (int64_t w = 0; w < width; ++w) {
            const int64_t s = h * padded + first + w;
            if (first + w >= slots[h]) {
                for (int64_t d = 0; d < dim; ++d) out[d * width + w] = 0;
                start[s] = -kInfinity;
                slope[s] = base[s] = 0;
                code[s] = 0;
                continue;
            }
            const float* row = codebook + (h * codes + code[s]) * dim;
            double square[kLanes] = {};
            auto place = [&](int64_t d, int j) {
                const double value = static_cast<double>(row[d]) - centre[d];
                square[j] += value * value;
                out[d * width + w] = row[d] - centre[d];
            };
            int64_t d = 0;
            for (; d + kLanes <= dim; d += kLanes) {
                for (int j = 0; j < kLanes; ++j) place(d + j, j);
            }
            for (; d < dim; ++d) place(d, 0);
            const double norm2 = (square[0] + square[1]) + (square[2] + square[3]);
            start[s] = static_cast<float>(-0.5 * norm2);
            slope[s] = static_cast<float>(relative * std::sqrt(norm2) + absolute);
            base[s] = norm2 > kMaxSquare ? kInfinity : static_cast<float>(relative * 0.5 * norm2 + absolute);
        }
    }
    for (int64_t h = 0; h < heads; ++h) {
        max_slope[h] = *std::max_element(slope + h * padded, slope + (h + 1) * padded);
        max_base[h] = *std::max_element(base + h * padded, base + (h + 1) * padded);
    }
}

void PreparedCodebook::Free::operator()(void* memory) const { ::operator delete(memory, kAlignment); }

}  // namespace metarec
