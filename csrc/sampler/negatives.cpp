#include "sampler/negatives.h"

#include <cmath>

#include "core/vec.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace metarec::METAREC_ISA {
namespace {

typedef uint32_t vuint __attribute__((vector_size(METAREC_VECTOR_BYTES)));
typedef uint64_t vulong __attribute__((vector_size(METAREC_VECTOR_BYTES)));

constexpr int kLanes = kFloats;
constexpr int kBlocks = 64;                   // Philox blocks generated at once: a few rows' worth, well inside L1
constexpr int kSlots = 4 * kBlocks;           // words of them
constexpr int kPadded = kSlots + 2 * kLanes;  // vectors may run past a row's last slot
constexpr int kLinear = 4 * kLanes;           // up to here comparing with every seen item beats a binary search
constexpr int kAttempts = 16;                 // draws from the alias table before the exact inverse

template <typename V, typename T>
inline V load_as(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// 64-bit products of the even 32-bit lanes.
inline vulong multiply_even(vuint a, vuint b) {
#if defined(METAREC_ISA_avx512)
    return (vulong)_mm512_maskz_mul_epu32(__mmask8(0xFF), (__m512i)a, (__m512i)b);  // the plain form warns in gcc 12
#elif defined(METAREC_ISA_avx2)
    return (vulong)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (vulong)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return ((vulong)a & 0xFFFFFFFFull) * ((vulong)b & 0xFFFFFFFFull);
#endif
}

// out[4 * i + j] = lane i of xj
inline void store_interleaved(vuint x0, vuint x1, vuint x2, vuint x3, uint32_t* out) {
#if defined(METAREC_ISA_avx512)
    const __m512i low01 = _mm512_unpacklo_epi32((__m512i)x0, (__m512i)x1);
    const __m512i high01 = _mm512_unpackhi_epi32((__m512i)x0, (__m512i)x1);
    const __m512i low23 = _mm512_unpacklo_epi32((__m512i)x2, (__m512i)x3);
    const __m512i high23 = _mm512_unpackhi_epi32((__m512i)x2, (__m512i)x3);
    const __m512i blocks[4] = {// of lanes j, j + 4, j + 8, j + 12
                               _mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
                               _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
    for (int j = 0; j < 4; ++j) {
        _mm_storeu_si128((__m128i*)(out + 4 * j), _mm512_castsi512_si128(blocks[j]));
        _mm_storeu_si128((__m128i*)(out + 4 * (j + 4)), _mm512_extracti32x4_epi32(blocks[j], 1));
        _mm_storeu_si128((__m128i*)(out + 4 * (j + 8)), _mm512_extracti32x4_epi32(blocks[j], 2));
        _mm_storeu_si128((__m128i*)(out + 4 * (j + 12)), _mm512_extracti32x4_epi32(blocks[j], 3));
    }
#else
    for (int lane = 0; lane < kLanes; ++lane, out += 4) {
        out[0] = x0[lane], out[1] = x1[lane], out[2] = x2[lane], out[3] = x3[lane];
    }
#endif
}

// words[4 * i + j] = word j of block (c0[i], c1[i]). Arrays hold whole vectors.
inline void philox_blocks(const Randomness& random, const uint32_t* c0, const uint32_t* c1, int blocks,
                          uint32_t* words) {
    const vuint m0 = vuint{} + kPhiloxMultiplier0, m1 = vuint{} + kPhiloxMultiplier1;
    const vulong high_half = vulong{} + 0xFFFFFFFF00000000ull;
    for (int i = 0; i < blocks; i += kLanes) {
        vuint x0 = load_as<vuint>(c0 + i), x1 = load_as<vuint>(c1 + i);
        vuint x2 = vuint{} + random.c2, x3 = vuint{} + random.c3;
        uint32_t k0 = random.key0, k1 = random.key1;
        for (int round = 0; round < kPhiloxRounds; ++round) {
            const vulong a_even = multiply_even(x0, m0), a_odd = multiply_even((vuint)((vulong)x0 >> 32), m0);
            const vulong b_even = multiply_even(x2, m1), b_odd = multiply_even((vuint)((vulong)x2 >> 32), m1);
            x0 = (vuint)((b_even >> 32) | (b_odd & high_half)) ^ x1 ^ k0;
            x1 = (vuint)((b_even & ~high_half) | (b_odd << 32));
            x2 = (vuint)((a_even >> 32) | (a_odd & high_half)) ^ x3 ^ k1;
            x3 = (vuint)((a_even & ~high_half) | (a_odd << 32));
            k0 += kPhiloxWeyl0;
            k1 += kPhiloxWeyl1;
        }
        store_interleaved(x0, x1, x2, x3, words + 4 * i);
    }
}

// Generates the words of rows [first, last) and hands each row's share over: consume(row, slot, slots, words), where
// slots are kPerBlock to a block. Blocks of short rows share vectors.
template <int kPerBlock, typename Consume>
inline void draw_rows(const NegativeRows& in, int64_t first, int64_t last, Consume consume) {
    struct Piece {
        int64_t row, slot;
        int slots, block;
    } pieces[kBlocks];
    alignas(64) uint32_t c0[kBlocks] = {}, c1[kBlocks] = {}, words[kPadded] = {};
    int64_t row = first, slot = 0;
    while (row < last) {
        int blocks = 0, count = 0;
        while (row < last && blocks < kBlocks) {
            const int64_t total = (in.segments[row + 1] - in.segments[row]) * in.count;
            const int64_t room = int64_t(kBlocks - blocks) * kPerBlock;
            const int64_t take = total - slot < room ? total - slot : room;
            if (take > 0) pieces[count++] = {row, slot, int(take), blocks};
            for (int64_t s = slot; s < slot + take; s += kPerBlock, ++blocks) {
                c0[blocks] = uint32_t(s / kPerBlock);
                c1[blocks] = uint32_t(in.first_row + row);
            }
            slot += take;
            if (slot == total) ++row, slot = 0;
        }
        philox_blocks(in.random, c0, c1, blocks, words);
        for (int i = 0; i < count; ++i) {
            consume(pieces[i].row, pieces[i].slot, pieces[i].slots, words + 4 * pieces[i].block);
        }
    }
}

template <typename Work>
inline void for_rows(const NegativeRows& in, Work work) {
    constexpr int64_t kRows = 32;
    const int64_t chunks = (in.rows + kRows - 1) / kRows;
#pragma omp parallel for schedule(dynamic, 1) if (in.segments[in.rows] * in.count > 32768)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t first = chunk * kRows, last = first + kRows < in.rows ? first + kRows : in.rows;
        for (int64_t row = first; row < last; ++row) {  // users lie anywhere in memory
            const int64_t at = in.seen_offsets[in.users[row]];
            __builtin_prefetch(static_cast<const char*>(in.seen) + at * (in.wide ? 8 : 4));
        }
        work(first, last);
    }
}

// Uniform in [0, n) for a slot whose first word was refused.
inline uint32_t bounded_again(const Randomness& random, uint32_t n, int64_t slot, uint32_t row) {
    for (int attempt = 1;; ++attempt) {
        const PhiloxBlock block = block_of(random, uint32_t(slot / 4), row, attempt);
        const uint64_t product = uint64_t(block.word[slot % 4]) * n;
        if (uint32_t(product) >= (0 - n) % n || attempt + 1 >= kMaxAttempts) return uint32_t(product >> 32);
    }
}

// below[i] = how many seen items lie at or under values[i]; if kAsRanks, how many have seen[j] - j <= values[i].
// values and below hold whole vectors.
template <bool kAsRanks>
inline void count_below(const int32_t* __restrict seen, int count, const int32_t* __restrict values, int slots,
                        int32_t* __restrict below) {
    if (count <= kLinear) {
        for (int i = 0; i < slots; i += kLanes) {
            const vint value = load_as<vint>(values + i);
            vint sum = {};
            for (int j = 0; j < count; ++j) sum -= (vint{} + (kAsRanks ? seen[j] - j : seen[j])) <= value;
            std::memcpy(below + i, &sum, sizeof sum);
        }
        return;
    }
    // one binary search for each slot, all a step at a time: independent loads, no branches
    for (int i = 0; i < slots; ++i) below[i] = 0;
    for (int length = count, half; length > 0; length -= half) {
        half = (length + 1) / 2;
        for (int i = 0; i < slots; ++i) {
            const int probe = below[i] + half - 1;
            below[i] += (kAsRanks ? seen[probe] - probe : seen[probe]) <= values[i] ? half : 0;
        }
    }
}

inline bool contains(const int32_t* seen, int count, int32_t item) {
    int below = 0;
    for (int length = count, half; length > 0; length -= half) {
        half = (length + 1) / 2;
        below += seen[below + half - 1] <= item ? half : 0;
    }
    return below > 0 && seen[below - 1] == item;
}

void uniform_narrow(const NegativeRows& in, int64_t first, int64_t last) {
    alignas(64) int32_t ranks[kPadded] = {}, below[kPadded];
    draw_rows<4>(in, first, last, [&](int64_t row, int64_t slot, int slots, const uint32_t* words) {
        const int64_t user = in.users[row];
        const int32_t* seen = static_cast<const int32_t*>(in.seen) + in.seen_offsets[user];
        const int64_t count = in.seen_counts[user];
        const uint32_t n = uint32_t(in.num_items - count);
        uint32_t refused = 0;
        for (int i = 0; i < slots; ++i) {
            const uint64_t product = uint64_t(words[i]) * n;
            ranks[i] = int32_t(product >> 32);
            refused |= uint32_t(product) < n;
        }
        if (refused) {
            const uint32_t threshold = (0 - n) % n;
            for (int i = 0; i < slots; ++i) {
                if (words[i] * n < threshold) {
                    ranks[i] = int32_t(bounded_again(in.random, n, slot + i, uint32_t(in.first_row + row)));
                }
            }
        }
        // the unseen item of a rank: as many places further as seen items lie below it
        count_below<true>(seen, int(count), ranks, slots, below);
        const float logq = float(-std::log(double(n)));
        int64_t* negatives = in.negatives + in.segments[row] * in.count + slot;
        float* logs = in.logq + in.segments[row] * in.count + slot;
        for (int i = 0; i < slots; ++i) negatives[i] = ranks[i] + below[i];
        for (int i = 0; i < slots; ++i) logs[i] = logq;
    });
}

void uniform_wide(const NegativeRows& in, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const int64_t user = in.users[row], count = in.seen_counts[user];
        const int64_t* seen = static_cast<const int64_t*>(in.seen) + in.seen_offsets[user];
        const uint64_t n = uint64_t(in.num_items - count);
        const float logq = float(-std::log(double(n)));
        const int64_t begin = in.segments[row] * in.count, end = in.segments[row + 1] * in.count;
        for (int64_t slot = 0; slot < end - begin; ++slot) {
            const int64_t rank = int64_t(bounded_wide(in.random, n, slot, uint32_t(in.first_row + row), 0));
            int64_t low = 0, high = count;
            while (low < high) {
                const int64_t middle = (low + high) / 2;
                if (seen[middle] - middle <= rank) {
                    low = middle + 1;
                } else {
                    high = middle;
                }
            }
            in.negatives[begin + slot] = rank + low;
            in.logq[begin + slot] = logq;
        }
    }
}

// Exact inverse of the cumulative weights of what is unseen.
int64_t inverse_unseen(const NegativeRows& in, const Popularity& popularity, const int32_t* seen, int64_t count,
                       uint64_t unseen_weight, int64_t slot, uint32_t row) {
    int64_t mass = int64_t(bounded_wide(in.random, unseen_weight, slot, row, kAttempts));
    for (int64_t j = 0; j < count && popularity.cumulative[seen[j]] <= mass; ++j) {
        mass += popularity.cumulative[seen[j] + 1] - popularity.cumulative[seen[j]];
    }
    int64_t low = 0, high = in.num_items - 1;  // the last item whose predecessors weigh at most mass
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (popularity.cumulative[middle] <= mass) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

struct Drawn {
    int32_t item;
    float log_p;
};

// Without a branch: which half of a cell is drawn cannot be predicted.
inline Drawn from_cell(const AliasCell* cells, uint32_t column, uint32_t word) {
    const AliasCell& cell = cells[column];
    const uint32_t other = word >= cell.threshold;
    return {int32_t(column ^ ((column ^ cell.alias) & (0 - other))), cell.log_p[other]};
}

// Draws on where the first attempt was refused or seen.
Drawn popular_again(const NegativeRows& in, const Popularity& popularity, const int32_t* seen, int64_t count,
                    uint64_t unseen_weight, uint32_t threshold, int64_t slot, uint32_t row) {
    const uint32_t n = uint32_t(in.num_items);
    for (int attempt = 1; attempt < kAttempts; ++attempt) {
        const PhiloxBlock block = block_of(in.random, uint32_t(slot / 2), row, attempt);
        const uint64_t product = uint64_t(block.word[2 * (slot % 2)]) * n;
        if (uint32_t(product) < threshold) continue;
        const Drawn drawn = from_cell(popularity.cells, uint32_t(product >> 32), block.word[2 * (slot % 2) + 1]);
        if (!contains(seen, int(count), drawn.item)) return drawn;
    }
    const int64_t item = inverse_unseen(in, popularity, seen, count, unseen_weight, slot, row);
    return {int32_t(item), popularity.cells[item].log_p[0]};
}

void popular_rows(const NegativeRows& in, const Popularity& popularity, int64_t first, int64_t last) {
    constexpr int kHalf = kSlots / 2;  // two words a draw
    alignas(64) int32_t items[kHalf + 2 * kLanes] = {}, below[kHalf + 2 * kLanes];
    alignas(64) uint32_t columns[kHalf];
    float log_p[kHalf];
    const uint32_t n = uint32_t(in.num_items), threshold = (0 - n) % n;
    const double total = double(uint64_t(in.num_items) * kCapacity);
    draw_rows<2>(in, first, last, [&](int64_t row, int64_t slot, int slots, const uint32_t* words) {
        const int64_t user = in.users[row], count = in.seen_counts[user];
        const int32_t* seen = static_cast<const int32_t*>(in.seen) + in.seen_offsets[user];
        const uint64_t unseen_weight = uint64_t(in.num_items) * kCapacity - uint64_t(popularity.seen_weights[user]);
        for (int i = 0; i < slots; ++i) {
            columns[i] = uint32_t(uint64_t(words[2 * i]) * n >> 32);
            __builtin_prefetch(popularity.cells + columns[i]);
        }
        for (int i = 0; i < slots; ++i) {
            const Drawn drawn = from_cell(popularity.cells, columns[i], words[2 * i + 1]);
            items[i] = drawn.item;
            log_p[i] = drawn.log_p;
        }
        count_below<false>(seen, int(count), items, slots, below);
        const double shift = std::log(double(unseen_weight) / total);
        int64_t* negatives = in.negatives + in.segments[row] * in.count + slot;
        float* logq = in.logq + in.segments[row] * in.count + slot;
        for (int i = 0; i < slots; ++i) {
            Drawn drawn{items[i], log_p[i]};
            const bool is_seen = below[i] > 0 && seen[below[i] - 1] == items[i];
            if (is_seen || words[2 * i] * n < threshold) {
                drawn = popular_again(in, popularity, seen, count, unseen_weight, threshold, slot + i,
                                      uint32_t(in.first_row + row));
            }
            negatives[i] = drawn.item;
            logq[i] = float(double(drawn.log_p) - shift);
        }
    });
}

}  // namespace

void uniform_negatives(const NegativeRows& in) {
    for_rows(in, [&](int64_t first, int64_t last) {
        in.wide ? uniform_wide(in, first, last) : uniform_narrow(in, first, last);
    });
}

void popular_negatives(const NegativeRows& in, const Popularity& popularity) {
    for_rows(in, [&](int64_t first, int64_t last) { popular_rows(in, popularity, first, last); });
}

}  // namespace metarec::METAREC_ISA
