// The scan: scores of all codes for a tile of rows, and the groups that can contain the nearest code.
#pragma once

#include "vq/nearest_codeword/packing.h"

namespace metarec::METAREC_ISA {
namespace {

// Rows of a tile as words [count, kRows]; rows beyond `rows` repeat the first.
template <int kBits>
inline void pack_tile(const Search& search, int64_t h, const float* const* row, int64_t first, const Workspace& w) {
    const Codebook& codebook = search.codebook;
    const int64_t dim = codebook.dim;
    const float* mean = codebook.mean + h * dim;
    uint32_t* words = w.words + first * codebook.words;
    if constexpr (kBits < 32) {
        for (int r = 0; r < kRows; ++r) {
            float square;
            const float largest = measure(row[r], mean, dim, &square);
            // too small or too large: the row is left to float32
            const bool fits = largest >= kSmallest && square <= kMaxSquare;
            w.norm[first + r] = norm_bound(square, dim);
            if (!fits) {
                for (int64_t j = 0; j < codebook.words; ++j) words[j * kRows + r] = 0;
                w.rounding[first + r] = kInfinity;
                w.factor[first + r] = 0;
                w.offset[first + r] = 0;
                continue;
            }
            const float scale = largest / most_of(kBits);
            int32_t total;
            const float rest = to_integers(row[r], mean, dim, kBits, scale, false, words + r, kRows, &total);
            w.rounding[first + r] = norm_bound(rest, dim);
            w.factor[first + r] = scale;
            w.offset[first + r] = kBits == 8 ? -128 * total : 0;
        }
    } else {
        float square[kRows] = {};
        float* packed = reinterpret_cast<float*>(words);
        for (int64_t d = 0; d < dim; ++d) {
            for (int r = 0; r < kRows; ++r) {
                const float value = row[r][d] - mean[d];
                packed[d * kRows + r] = value;
                square[r] += value * value;
            }
        }
        for (int r = 0; r < kRows; ++r) {
            w.norm[first + r] = norm_bound(square[r], dim);
            w.rounding[first + r] = 0;
        }
    }
}

// The largest score of each group of a panel, for a tile of rows: maxima [kRows, stride].
template <int kBits>
[[gnu::always_inline]] inline void scan(const uint32_t* __restrict rows, [[maybe_unused]] const float* factor,
                                        [[maybe_unused]] const int32_t* offset, const uint32_t* __restrict words,
                                        const float* start, [[maybe_unused]] float scale, int64_t count, int64_t group,
                                        float* maxima, int64_t stride) {
    const int64_t vector = count * kFloats;
    for (int64_t v = 0; v < group; v += kVectors, words += kVectors * vector, start += kVectors * kFloats) {
        vfloat score[kRows][kVectors];
        const uint32_t* row = rows;
        const uint32_t* code = words;
        if constexpr (kBits < 32) {
#if defined(__AVX512VNNI__)
            vint sum[kRows][kVectors];
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j) sum[r][j] = vint{} + offset[r];
            }
            for (int64_t w = 0; w < count; ++w, row += kRows, code += kFloats) {
                __m512i codes[kVectors];
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j) codes[j] = _mm512_loadu_si512(code + j * vector);
#pragma GCC unroll 16
                for (int r = 0; r < kRows; ++r) {
                    const __m512i value = _mm512_set1_epi32(static_cast<int>(row[r]));
#pragma GCC unroll 4
                    for (int j = 0; j < kVectors; ++j) {
                        const __m512i so_far = (__m512i)sum[r][j];
                        sum[r][j] = (vint)(kBits == 8 ? _mm512_dpbusd_epi32(so_far, codes[j], value)
                                                      : _mm512_dpwssd_epi32(so_far, codes[j], value));
                    }
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j) {
                    score[r][j] = __builtin_convertvector(sum[r][j], vfloat) * broadcast(factor[r] * scale) +
                                  load(start + j * kFloats);
                }
            }
#endif
        } else {
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j) score[r][j] = load(start + j * kFloats);
            }
            const float* x = reinterpret_cast<const float*>(row);
            const float* c = reinterpret_cast<const float*>(code);
            for (int64_t d = 0; d < count; ++d, x += kRows, c += kFloats) {
                vfloat codes[kVectors];
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j) codes[j] = load(c + j * vector);
#pragma GCC unroll 16
                for (int r = 0; r < kRows; ++r) {
                    const vfloat value = broadcast(x[r]);
#pragma GCC unroll 4
                    for (int j = 0; j < kVectors; ++j) score[r][j] += value * codes[j];
                }
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            vfloat most = score[r][0];
#pragma GCC unroll 4
            for (int j = 1; j < kVectors; ++j) most = max(most, score[r][j]);
            float* at = maxima + r * stride;
            store(at, v == 0 ? most : max(most, load(at)));
        }
    }
}

// What the score of the nearest code (of the second nearest) is at least: the largest (second largest) of the panels'
// maxima less their errors.
inline float least_score(const float* maxima, const float* error, int64_t panels, bool of_second) {
    vfloat best = broadcast(-kInfinity), second = best;
    for (int64_t p = 0; p < panels; ++p) {
        const vfloat score = load(maxima + p * kFloats) - broadcast(error[p]);
        if (of_second) second = max(min(best, score), second);  // NaN, from an overflow, raises neither
        best = max(score, best);
    }
    if (!of_second) return max_lane(best);
#pragma GCC unroll 4
    for (int distance = kFloats / 2; distance > 0; distance /= 2) {
        const vfloat other = swap_lanes(best, distance);
        second = max(max(second, swap_lanes(second, distance)), min(best, other));
        best = max(best, other);
    }
    return second[0];
}

// Groups whose score can reach the threshold, a bit each; NaN, from an overflow, counts as reaching it.
inline uint64_t groups_above(const float* maxima, const float* error, int64_t panels, float threshold) {
    uint64_t bits = 0;
    for (int64_t p = 0; p < panels; ++p) {
        const uint32_t below = lanes_below(load(maxima + p * kFloats) + broadcast(error[p]), broadcast(threshold));
        bits |= static_cast<uint64_t>(~below & ((1u << kFloats) - 1)) << (p * kFloats);
    }
    return bits;
}

// Codes of the groups that may reach the threshold. Returns how many, or -1 if that is more than the limit.
inline int64_t collect(const Search& search, int64_t h, float threshold, const float* maxima, const float* error,
                       int64_t panels, int64_t limit, int32_t* candidates) {
    constexpr int64_t kAtOnce = 64 / kFloats;  // panels whose groups fill a word
    const Codebook& codebook = search.codebook;
    const int64_t group = codebook.group, slots = codebook.slots[h];
    const int32_t* code = codebook.code + h * codebook.panels * kFloats * group;
    int64_t count = 0;
    for (int64_t p = 0; p < panels; p += kAtOnce) {
        uint64_t bits =
            groups_above(maxima + p * kFloats, error + p, panels - p < kAtOnce ? panels - p : kAtOnce, threshold);
        for (; bits != 0; bits &= bits - 1) {
            const int64_t first = (p * kFloats + __builtin_ctzll(bits)) * group;
            if (first >= slots) continue;
            if (count + group > limit) return -1;
            // as many as the largest group has: what is too much is not counted
            std::memcpy(candidates + count, code + first, kMaxGroup * sizeof *code);
            count += first + group <= slots ? group : slots - first;
        }
    }
    return count;
}

}  // namespace
}  // namespace metarec::METAREC_ISA
