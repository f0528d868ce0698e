// Scores by integers of 16 bits, at twice the rate of float32, with a bound on their error: most scores are so far from
// the target's that the bound says which is larger.
//
// Let x be a row of h followed by 1, and y an item followed by its bias, of dim elements; a and b their scales, x' and
// y' the nearest integers of x / a and y / b. The integer product I = x'.y' is exact, and with R >= ||x||, Q >= ||y||
// and e = .51 sqrt(dim),
//     |score - a b I| <= E = a e (Q + b e) + R b e + g R Q + underflow,   g = (dim + 4) 2^-23:
// integers leave out at most .51 of an element (.01 for the rounding of x / a) and a float32 sum of dim products is off
// by less than g R Q. Scales keep ||x / a|| and ||y / b|| within kNorm, so that no sum reaches 2^31.
#pragma once

#include "core/vec.h"

namespace metarec::METAREC_ISA {
namespace {

// A score that the integers leave open: row of the block, item of the table.
struct Doubt {
    int64_t row, item;
};

// What a thread screens a block with.
struct Screen {
    float* scale;     // [rows] a
    float* norm;      // [rows] R
    int32_t* low;     // [rows] this I or a lower one is a lower score than the target's
    int32_t* high;    // [rows] a higher I is a higher score
    int32_t* higher;  // [rows] how many were
    int32_t* rows;    // [panels, words, kScreenRows] pairs of integers
    int32_t* items;   // [items of a tile, words]
    Doubt* doubts;
    int64_t num_doubts;
};

#if defined(METAREC_PAIRS)

constexpr int64_t kScreenRows = 2 * kFloats;              // of a panel
constexpr int kScreenItems = kFloats == 16 ? 12 : 6;      // whose sums are in registers at a time
constexpr int64_t kScreenLeast = 16, kScreenMost = 4096;  // elements of a row
constexpr float kNorm = 44000.0f;                         // (kNorm + .51 sqrt(kScreenMost))^2 < 2^31
constexpr int32_t kNever = 2147483000;                    // more than any I

// Pairs of integers that hold a row: D elements, and one for the bias.
inline int64_t screen_words(int64_t D, bool has_bias) { return (D + has_bias + 1) / 2; }

struct Size {
    float norm, largest;
};

// At least the norm of a row and its last element, and the largest of them.
inline Size measure(const float* row, int64_t D, float last) {
    vfloat square = {}, largest = {};
    for (int64_t d = 0; d < D; d += kFloats) {
        const vfloat x = load_first(row + d, D - d);
        square += x * x;
        largest = max(largest, max(x, -x));
    }
    const float rest = last < 0 ? -last : last, most = max_lane(largest);
    const float dim = static_cast<float>(D + 1);
    const float norm = __builtin_sqrtf(sum_lanes(square) + last * last) * (1 + (dim + 8) * 0x1p-23f);
    return {norm + __builtin_sqrtf(dim) * 0x1p-62f, most > rest ? most : rest};  // squares may underflow
}

inline float scale_of(Size size) {
    const float by_norm = size.norm / kNorm, by_largest = size.largest / 32767;
    return by_norm > by_largest ? by_norm : by_largest;
}

// A row and its last element as integers of `scale`.
inline void to_integers(const float* row, int64_t D, bool has_last, float last, float scale, int16_t* out) {
    const float inverse = 1 / scale, round = 12582912.0f;  // 1.5 * 2^23: the sum's lowest bits are the nearest integer
    for (int64_t d = 0; d < D; d += kFloats) {
        const vint integers = (vint)(load_first(row + d, D - d) * inverse + round);
#if defined(METAREC_ISA_avx512)
        const __mmask16 inside = D - d >= kFloats ? 0xFFFF : static_cast<__mmask16>((1u << (D - d)) - 1);
        _mm512_mask_cvtepi32_storeu_epi16(out + d, inside, (__m512i)integers);
#else
        for (int64_t i = 0; i < (D - d < kFloats ? D - d : kFloats); ++i)
            out[d + i] = static_cast<int16_t>(integers[i]);
#endif
    }
    if (has_last) out[D] = static_cast<int16_t>(__builtin_rintf(last * inverse));
    if ((D + has_last) % 2 == 1) out[D + has_last] = 0;
}

// The rows of a block, as panels; missing ones decide nothing.
inline void pack_screen(const float* h, int64_t rows, int64_t D, bool has_bias, const Screen& s) {
    const int64_t words = screen_words(D, has_bias);
    int32_t row[kScreenMost / 2 + 1];
    for (int64_t r = 0; r < (rows + kScreenRows - 1) / kScreenRows * kScreenRows; ++r) {
        int32_t* out = s.rows + r / kScreenRows * kScreenRows * words + r % kScreenRows;
        const bool missing = r >= rows;
        if (!missing) {
            const Size size = measure(h + r * D, D, has_bias ? 1.0f : 0.0f);
            s.norm[r] = size.norm;
            s.scale[r] = scale_of(size);
            to_integers(h + r * D, D, has_bias, 1.0f, s.scale[r], reinterpret_cast<int16_t*>(row));
        }
        for (int64_t w = 0; w < words; ++w) out[w * kScreenRows] = missing ? 0 : row[w];
        s.higher[r] = 0;
        s.low[r] = s.high[r] = kNever;
    }
}

// A bound Q on the norms of a group of items, and their largest element: its scale is that of the group. Of an item
// that is not finite, its own norm, which no comparison with a bound passes.
inline Size measure_items(const float* table, const float* bias, int64_t items, int64_t D) {
    Size most = {};
    for (int64_t v = 0; v < items; ++v) {
        const Size size = measure(table + v * D, D, bias == nullptr ? 0.0f : bias[v]);
        if (!(size.norm < __builtin_inff())) return size;
        most.norm = size.norm > most.norm ? size.norm : most.norm;
        most.largest = size.largest > most.largest ? size.largest : most.largest;
    }
    return most;
}

// Which integer products decide, for rows of these targets' scores and items of this size.
inline void set_thresholds(const float* own, int64_t rows, int64_t dim, Size items, const Screen& s) {
    const double b = scale_of(items), Q = items.norm, e = 0.51 * __builtin_sqrt(static_cast<double>(dim));
    const double g = static_cast<double>(dim + 4) * 0x1p-23;
    auto bounded = [](double x) { return !(x > -kNever) ? -kNever : x > kNever ? kNever : static_cast<int32_t>(x); };
    for (int64_t r = 0; r < rows; ++r) {
        const double a = s.scale[r], R = s.norm[r];
        const double E = 1.001 * (a * e * (Q + b * e) + R * b * e + g * R * Q + 1e-35);
        s.low[r] = bounded(__builtin_ceil((own[r] - E) / (a * b))) - 1;
        s.high[r] = bounded(__builtin_floor((own[r] + E) / (a * b)));
    }
}

// Counts the items of a tile that are surely higher for the rows of a panel; others that may be as high are doubts.
template <int N>
[[gnu::always_inline]] inline void screen_items(const int32_t* __restrict rows, const int32_t* __restrict items,
                                                int64_t words, const int32_t* low, const int32_t* high, int32_t* higher,
                                                int64_t first_row, int64_t first_item, Screen& s) {
    vint sum[N][2] = {};
    for (int64_t w = 0; w < words; ++w, rows += kScreenRows, ++items) {
        const vint x0 = load(rows), x1 = load(rows + kFloats);
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            const vint item = items[i * words] - vint{};
            sum[i][0] = add_pairs(sum[i][0], x0, item);
            sum[i][1] = add_pairs(sum[i][1], x1, item);
        }
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
        const vint least = load(low + j * kFloats), most = load(high + j * kFloats);
        vint above = {}, possible = {};
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            above = count_greater(above, sum[i][j], most);
            possible = count_greater(possible, sum[i][j], least);
        }
        store(higher + j * kFloats, load(higher + j * kFloats) + above);
        if (lane_bits(above != possible) == 0) continue;
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            for (uint32_t open = lane_bits((sum[i][j] > least) & (sum[i][j] <= most)); open != 0; open &= open - 1) {
                s.doubts[s.num_doubts++] = {first_row + j * kFloats + __builtin_ctz(open), first_item + i};
            }
        }
    }
}

#endif

}  // namespace
}  // namespace metarec::METAREC_ISA
