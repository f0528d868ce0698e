// Nearest codeword: scores with a proven error for all codes, then true distances for the few that can still win.
//
// With m the mean code, X = x - m and C = c - m, the code of least ||x - c||^2 has the largest score
// s = X.C - ||C||^2 / 2. The scan computes scores S from approximations x' of X and c' of C, float32 or integers of 8
// or 16 bits times a scale, and keeps for each row the largest score of every group of codes. With R >= ||X||, ||x'||,
// r >= ||X - x'||, and for the codes of a panel Q >= ||C||, ||c'||, q >= ||C - c'||, and u = 2^-24,
//     |S - s| <= E = r Q + R q + k u (R Q + Q^2 / 2) + f (R + Q)^2 + underflow.
// k: float32 arithmetic. A sum of dim products, fused or not, rounds partial sums of magnitude at most R Q + Q^2 / 2
// dim
//   times, and ||C||^2 / 2 is such a sum: k = 2 dim + 16 covers both, the roundings of X and C, and a product alone.
//   Integer sums are exact; their conversion, scale and the sum with -||C||^2 / 2 leave k = dim + 16.
// f = (dim + 4) 2^-53: the float64 sum that defines the index differs from the real distance by up to 2 f (R + Q)^2.
// A slot that stands for a clump of radius p adds R p + Q p: by so much can a member's score exceed its.
// With L the largest S - E of all, a group whose largest S + E is below L cannot hold the nearest code. Members of a
// clump are told apart the same way by the scores X.e - g of their differences e from the first, g = (first - m).e +
// ||e||^2 / 2, whose error is k u (R p + Q p + p^2 / 2) + f (R + Q)^2.
// For the codes left, d = sum (x - c)^2 in float32 is within (dim + 8) u d of the distance: mostly that proves the
// nearest. If not, those that can still win are compared by the definition itself, in float64 (exact.cpp).
//
// By products the code of largest x.c = X.C + m.C (+ x.m, the same for all) is sought, whatever the codes' lengths.
// -||C||^2 / 2 becomes m.C, summed in float64 and rounded once, so that with M >= ||m||
//     |S - s| <= E = r Q + R q + k u (R Q + M Q) + f (R + M) (Q + M) + underflow,
// where f covers the sum in float64 that defines the product. A clump adds R p + M p, and tells its members apart with
// g = -m.e. For the codes left, x.c in float32 is within (dim + 8) u ||x|| ||c|| of the product; what a code costs is
// minus its product.
#include "vq/nearest_codeword.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "core/vec.h"
#include "vq/exact.h"

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
constexpr int64_t kNarrow = 12;   // up to so many elements are screened in 16 bits: they tell codes apart by little
constexpr int64_t kWide = 32768;  // more are not screened: sums of products, 127 * 255 each, might overflow
// The largest integer: kNarrow products of 16 bits are summed without overflow.
constexpr float most_of(int bits) { return bits == 8 ? 127 : 8191; }
constexpr float kSmallest = 0x1p-56f;       // below this largest element, integers are left to float32
constexpr int64_t kPossible = 8;            // codes that a screen leaves to float64
constexpr int64_t kFew = 32, kWaiting = 8;  // candidates of a row, rows that are decided together

// Rows of a block: packed rows stay in L1 while one panel after the other passes over them; longer rows stay in L2,
// and more of them share each panel.
inline int64_t block_rows(int64_t words) { return words <= 32 || words > 128 ? 96 : 48; }

struct Search {
    const Codebook& codebook;
    const SearchRows& rows;
    const SearchOutput& out;
    const Unsettled* unsettled;
    bool products;
    int64_t limit;  // codes whose distances are worth computing before a search in float32 would be cheaper
};

// What a thread works with, carved from its scratch. Arrays of a block: [tiles, ...].
struct Workspace {
    uint32_t* words;      // [tiles, words, kRows]
    float* norm;          // [rows] at least ||X||
    float* rounding;      // [rows] at least ||X - x'||
    float* factor;        // [rows] scale of the integer sums
    int32_t* offset;      // [rows] what unsigned codes add to them, negated
    float* maxima;        // [rows, panels * lanes]
    float* error;         // [rows, panels], padded to whole vectors
    float* threshold;     // [rows] groups that may reach it may hold the nearest code
    int32_t* candidates;  // [codes], padded
    float* distance;      // [codes], padded
    float* clump_maxima;  // [kRows, groups of clumps] of one tile
    int64_t* clump_tile;  // [clumps] the tile whose maxima they are
    int32_t* opened;      // [clumps] to be searched for one row
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
    w.distance = reinterpret_cast<float*>(take(codebook.codes + 4 + kFloats));
    w.clump_maxima = reinterpret_cast<float*>(take(kRows * codebook.clumps.groups));
    w.clump_tile = reinterpret_cast<int64_t*>(take(2 * codebook.clumps.most));
    w.opened = reinterpret_cast<int32_t*>(take(codebook.clumps.most));
    w.size = used;
    return w;
}

inline int64_t used_panels(const Codebook& codebook, int64_t h) {
    const int64_t width = codebook.lanes * codebook.group;
    return (codebook.slots[h] + width - 1) / width;
}

// A bound on a norm from a float32 sum of squares: slack for the rounding of the sum, and for squares that underflow.
inline float norm_bound(float square, int64_t dim) {
    if (!(square <= kMaxSquare)) return kInfinity;
    return __builtin_sqrtf(square) * (1 + static_cast<float>(dim + 8) * 0x1p-23f) +
           __builtin_sqrtf(static_cast<float>(dim)) * 0x1p-62f;
}

// At least the norm of a vector.
inline float length(const float* x, int64_t dim) {
    vfloat sum = {};
    for (int64_t d = 0; d < dim; d += kFloats) {
        const vfloat value = load_first(x + d, dim - d);
        sum += value * value;
    }
    return norm_bound(sum_lanes(sum), dim);
}

// The largest element of row - mean, and its squared norm.
inline float measure(const float* row, const float* mean, int64_t dim, float* square) {
    vfloat largest = {}, sum = {};
    for (int64_t d = 0; d < dim; d += kFloats) {
        const vfloat x = load_first(row + d, dim - d) - load_first(mean + d, dim - d);
        largest = max(largest, max(x, -x));
        sum += x * x;
    }
    *square = sum_lanes(sum);
    return max_lane(largest);
}

// row - mean in integers of `scale`, packed into words that are `step` words apart; 8-bit codes get 128 added.
// Returns the squared norm of what they leave out, and sets `total` to the integers' sum.
inline float to_integers(const float* row, const float* mean, int64_t dim, int bits, float scale, bool code,
                         uint32_t* out, int64_t step, int32_t* total) {
    const float round = 12582912.0f;  // 1.5 * 2^23: the sum's lowest bits are the nearest integer
    const float inverse = 1 / scale;
    const uint32_t flip = code && bits == 8 ? 0x80808080u : 0;
    const int64_t in_word = 32 / bits;
    vfloat square = {}, sum = {};
    for (int64_t d = 0; d < dim; d += kFloats) {
        const vfloat x = load_first(row + d, dim - d) - load_first(mean + d, dim - d);
        const vfloat shifted = x * inverse + round;
        const vfloat integer = shifted - round;
        const vfloat error = x - integer * scale;
        square += error * error;
        sum += integer;
        uint32_t words[kFloats / 2];
#if defined(METAREC_ISA_avx512)
        if (bits == 8) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm512_cvtepi32_epi8((__m512i)shifted));
        } else {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm512_cvtepi32_epi16((__m512i)shifted));
        }
#else
        for (int64_t w = 0; w < kFloats / in_word; ++w) {
            words[w] = 0;
            for (int64_t j = 0; j < in_word; ++j) {
                const uint32_t low = static_cast<uint32_t>(((vint)shifted)[w * in_word + j]) & ((1u << bits) - 1);
                words[w] |= low << (j * bits);
            }
        }
#endif
        for (int64_t w = 0; w < kFloats / in_word && d + in_word * w < dim; ++w) {
            out[(d / in_word + w) * step] = words[w] ^ flip;
        }
    }
    *total = static_cast<int32_t>(sum_lanes(sum));
    return sum_lanes(square);
}

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

inline bool wants_margin(const SearchOutput& out, int64_t row) {
    return out.margin != nullptr && row % out.margin_every == 0;
}

inline void emit(const Search& search, int64_t h, int64_t row, int64_t index, float margin, float row_error) {
    const int64_t at = h * search.rows.rows + row, dim = search.codebook.dim;
    search.out.indices[at] = index;
    if (wants_margin(search.out, row)) {
        const int64_t every = search.out.margin_every;
        search.out.margin[h * ((search.rows.rows + every - 1) / every) + row / every] = margin;
    }
    if (search.out.quantized == nullptr) return;
    search.out.row_error[at] = row_error;
    const float* __restrict code = search.codebook.original + (h * search.codebook.codes + index) * dim;
    float* __restrict quantized = search.out.quantized + at * dim;
    for (int64_t d = 0; d < dim; ++d) quantized[d] = code[d];
}

inline void recheck(const SearchOutput& out, int64_t rows) {
    if (out.rechecked == nullptr) return;
#pragma omp atomic
    *out.rechecked += rows;
}

// What an element adds to a cost.
template <Metric kMetric, typename T>
[[gnu::always_inline]] inline T cost_of(T x, T code) {
    if constexpr (kMetric == Metric::product) return -(x * code);
    const T error = x - code;
    return error * error;
}

// Costs of four codes: squared distances from x, or minus their products with it.
template <Metric kMetric>
inline void costs(const float* x, const float* const* code, int64_t dim, float* out) {
#if defined(METAREC_ISA_avx512)
    if (dim <= 8) {  // narrow codes are common, and half a vector is summed in half the time
        const __mmask8 inside = static_cast<__mmask8>((1u << dim) - 1);
        const __m256 value = _mm256_maskz_loadu_ps(inside, x);
        __m256 square[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            square[j] = cost_of<kMetric>(value, _mm256_maskz_loadu_ps(inside, code[j]));
        }
        return sum_eights(square, out);
    }
#endif
    vfloat sum[4] = {};
    int64_t d = 0;
    for (; d + kFloats <= dim; d += kFloats) {
        const vfloat value = load(x + d);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] += cost_of<kMetric>(value, load(code[j] + d));
    }
    if (d < dim) {
        const vfloat value = load_first(x + d, dim - d);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] += cost_of<kMetric>(value, load_first(code[j] + d, dim - d));
    }
    sum_lanes(sum, out);
}

// The squared distance of x from one code.
inline float squared_error(const float* x, const float* code, int64_t dim) {
    vfloat sum = {};
    for (int64_t d = 0; d < dim; d += kFloats) {
        const vfloat error = load_first(x + d, dim - d) - load_first(code + d, dim - d);
        sum += error * error;
    }
    return sum_lanes(sum);
}

// A cost in float64, in no particular order.
template <Metric kMetric>
inline double accurate_cost(const float* x, const float* code, int64_t dim) {
    constexpr int kDoubles = kFloats / 2;
    vdouble sum = {};
    int64_t d = 0;
    for (; d + kDoubles <= dim; d += kDoubles) {
        sum += cost_of<kMetric>(load_doubles(x + d), load_doubles(code + d));
    }
    double total = 0;
    for (int lane = 0; lane < kDoubles; ++lane) total += sum[lane];
    for (; d < dim; ++d) {
        total += cost_of<kMetric>(static_cast<double>(x[d]), static_cast<double>(code[d]));
    }
    return total;
}

inline double accurate_cost(const Search& search, const float* x, const float* code) {
    return search.products ? accurate_cost<Metric::product>(x, code, search.codebook.dim)
                           : accurate_cost<Metric::distance>(x, code, search.codebook.dim);
}

#if defined(METAREC_ISA_avx512)
// Costs of eight neighbouring codes [8, 8] for x [8]: two codes fill a vector.
template <Metric kMetric>
inline void costs_of_eight(const float* x, const float* codes, float* out) {
    const __m512 value = _mm512_broadcast_f32x8(_mm256_loadu_ps(x));
    __m512 square[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) square[j] = cost_of<kMetric>(value, _mm512_loadu_ps(codes + 16 * j));
    // sums of pairs, then of fours side by side in each quarter, then of eights; even and odd codes lie apart
    const __m512 left = _mm512_shuffle_ps(square[0], square[1], 0x88) + _mm512_shuffle_ps(square[0], square[1], 0xDD);
    const __m512 right = _mm512_shuffle_ps(square[2], square[3], 0x88) + _mm512_shuffle_ps(square[2], square[3], 0xDD);
    __m512 fours = _mm512_shuffle_ps(left, right, 0x88) + _mm512_shuffle_ps(left, right, 0xDD);
    fours += _mm512_shuffle_f32x4(fours, fours, 0xB1);
    const __m128 even = _mm512_castps512_ps128(fours), odd = _mm512_extractf32x4_ps(fours, 2);
    _mm_storeu_ps(out, _mm_unpacklo_ps(even, odd));
    _mm_storeu_ps(out + 4, _mm_unpackhi_ps(even, odd));
}
#endif

// The least of `count` costs, padded with infinities to a whole vector.
inline float least_of(const float* distance, int64_t count) {
    vfloat least = broadcast(kInfinity);
    for (int64_t i = 0; i < count; i += kFloats) least = min(load(distance + i), least);
    return min_lane(least);
}

// Costs of `count` codes for a row; infinity behind them, to a whole vector.
template <Metric kMetric>
inline void measure_costs(const Search& search, int64_t h, int64_t row, const int32_t* candidates, float* distance,
                          int64_t count) {
    const int64_t dim = search.codebook.dim;
    const float* x = search.rows.x + (h * search.rows.rows + row) * dim;
    const float* original = search.codebook.original + h * search.codebook.codes * dim;
    for (int64_t i = 0; i < count; i += 4) {
#if defined(METAREC_ISA_avx512)
        if (dim == 8) {
            const __m256i eight = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
            for (; i + 8 <= count; i += 8) {
                const __m256i run = _mm256_add_epi32(_mm256_set1_epi32(candidates[i]), eight);
                const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(candidates + i));
                if (_mm256_cmpeq_epi32_mask(codes, run) != 0xFF) break;
                costs_of_eight<kMetric>(x, original + candidates[i] * dim, distance + i);
            }
            if (i >= count) break;
        }
#endif
        const float* code[4];
        for (int64_t j = 0; j < 4; ++j) code[j] = original + candidates[i + j < count ? i + j : i] * dim;
        costs<kMetric>(x, code, dim, distance + i);
    }
    store(distance + count, broadcast(kInfinity));
}

// By how much the difference of two measured costs may err: relative * cost + absolute.
struct Blur {
    float relative, absolute;
    double of_float64;  // the same of products that are summed in float64, beside the definition's own error
    float reach(float cost) const { return cost + (relative * cost + absolute); }
};

// Measure the costs of candidates; norm is at least ||x - mean||.
inline Blur measure_candidates(const Search& search, int64_t h, int64_t row, float norm, const int32_t* candidates,
                               float* distance, int64_t count) {
    const Codebook& codebook = search.codebook;
    const float dim = static_cast<float>(codebook.dim);
    if (!search.products) {
        measure_costs<Metric::distance>(search, h, row, candidates, distance, count);
        return {3 * (dim + 8) * kUnit, dim * 0x1p-122f, 0};
    }
    measure_costs<Metric::product>(search, h, row, candidates, distance, count);
    float longest = codebook.one_length[h];
    if (longest == 0) {
        const float* length = codebook.length + h * codebook.codes;
        for (int64_t i = 0; i < count; ++i) {
            const float of_code = length[candidates[i]];
            longest = of_code > longest ? of_code : longest;
        }
    }
    const float size = (norm + codebook.mean_length[h]) * longest;  // no partial sum exceeds it
    if (!(size <= kMaxSquare)) {
        for (int64_t i = 0; i < count; ++i) distance[i] = 0;  // all equal: float32 says nothing
        return {0, kInfinity, static_cast<double>(kInfinity)};
    }
    const double definition = static_cast<double>(codebook.dim + 8) * 0x1p-51;
    return {0, 2.1f * (dim + 8) * kUnit * size + dim * 0x1p-122f, definition * static_cast<double>(size)};
}

// Ascending, by insertion: they come as a few ascending runs.
inline void sort(int32_t* codes, int64_t count) {
    for (int64_t i = 1; i < count; ++i) {
        const int32_t code = codes[i];
        int64_t at = i;
        for (; at > 0 && codes[at - 1] > code; --at) codes[at] = codes[at - 1];
        codes[at] = code;
    }
}

// Decide one row by the measured costs of `count` codes, among which the nearest is (and the second nearest, if the
// margin is wanted). A screen leaves it, and returns false, if float64 would have to compare many.
bool decide(const Search& search, int64_t h, int64_t row, int32_t* candidates, float* distance, int64_t count,
            const Blur& blur) {
    const Codebook& codebook = search.codebook;
    const int64_t dim = codebook.dim;
    const float* x = search.rows.x + (h * search.rows.rows + row) * dim;
    const float* original = codebook.original + h * codebook.codes * dim;
    const float least = least_of(distance, count), reach = blur.reach(least);
    // the squared error of a code that cost so much
    auto row_error = [&](int64_t index, float cost) {
        const bool needed = search.products && search.out.quantized != nullptr;
        return needed ? squared_error(x, original + index * dim, dim) : cost;
    };
    int64_t possible = 0, best = 0;
    for (int64_t i = 0; i < count; i += kFloats) {
        uint32_t bits = lanes_at_least(broadcast(reach), load(distance + i));
        if (count - i < kFloats) bits &= (1u << (count - i)) - 1;
        possible += __builtin_popcount(bits);
        best = bits != 0 ? i + __builtin_ctz(bits) : best;
    }
    if (possible == 1) {
        const int32_t index = candidates[best];
        float margin = 0;
        if (wants_margin(search.out, row)) {
            distance[best] = kInfinity;
            const float second = least_of(distance, count), near = blur.reach(second);
            double following = __builtin_inf();
            for (int64_t i = 0; i < count; ++i) {
                if (i == best || distance[i] > near) continue;
                const double d = accurate_cost(search, x, original + candidates[i] * dim);
                following = d < following ? d : following;
            }
            if (!codebook.duplicated[h * codebook.codes + index]) {
                margin = static_cast<float>(following - accurate_cost(search, x, original + index * dim));
            }
        }
        emit(search, h, row, index, margin, row_error(index, least));
        return true;
    }
    if (search.unsettled != nullptr && possible > kPossible) return false;
    if (search.rows.listed == nullptr) recheck(search.out, 1);  // those listed were counted when they were left
    const bool with_margin = wants_margin(search.out, row);
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (with_margin || !(distance[i] > reach)) {
            distance[kept] = distance[i];
            candidates[kept++] = candidates[i];
        }
    }
    if (!with_margin && least < kInfinity && blur.absolute < kInfinity) {
        // float64 in any order tells apart all but ties
        double nearest = __builtin_inf(), following = __builtin_inf();
        for (int64_t i = 0; i < kept; ++i) {
            const double d = accurate_cost(search, x, original + candidates[i] * dim),
                         loser = d < nearest ? nearest : d;
            best = d < nearest ? i : best;
            nearest = d < nearest ? d : nearest;
            following = loser < following ? loser : following;
        }
        const double doubt = search.products ? blur.of_float64 : static_cast<double>(dim + 8) * 0x1p-51 * following;
        if (following - nearest > doubt) {
            emit(search, h, row, candidates[best], 0, row_error(candidates[best], distance[best]));
            return true;
        }
    }
    sort(candidates, kept);
    Nearest nearest = {__builtin_inf(), __builtin_inf(), -1};
    offer_exact_f32(&nearest, x, original, candidates, kept, dim, codebook.metric);
    float margin = codebook.codes == 1 ? kInfinity : 0;  // every distance is infinite
    if (nearest.index >= 0 && !codebook.duplicated[h * codebook.codes + nearest.index]) {
        margin = static_cast<float>(nearest.second - nearest.least);
    }
    const int64_t index = nearest.index < 0 ? 0 : nearest.index;
    const float* code[4];
    for (int j = 0; j < 4; ++j) code[j] = original + index * dim;
    float error[4];
    costs<Metric::distance>(x, code, dim, error);
    emit(search, h, row, index, margin, row_error(index, error[0]));
    return true;
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

// Groups that may reach the threshold, a bit each; NaN, from an overflow, may.
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

// Replace codes that stand for a clump by the members that can be the nearest to a row, the i-th of the block.
int64_t open_clumps(const Search& search, int64_t h, int64_t row, int64_t i, const Workspace& w, int64_t count) {
    const Codebook& codebook = search.codebook;
    const Clumps& clumps = codebook.clumps;
    const int32_t* of_code = clumps.of_code + h * codebook.codes;
    const int64_t tile = i / kRows, dim = codebook.dim;
    bool any = false;
    for (int64_t c = 0; c < count; ++c) any |= of_code[w.candidates[c]] >= 0;
    if (!any) return count;
    // a group holds more clumps than the one that made it a candidate: those too far away stay closed
    const Blur blur = measure_candidates(search, h, row, w.norm[i], w.candidates, w.distance, count);
    const float least = least_of(w.distance, count), M = search.products ? codebook.mean_length[h] : 0;
    const float nearest = search.products ? blur.reach(least) : __builtin_sqrtf(least) * (1 + blur.relative) + 0x1p-60f;
    const bool with_margin = wants_margin(search.out, row), all = with_margin || !(nearest < kInfinity);
    // whether no member of a clump can be the nearest, whose first costs so much
    auto out_of_question = [&](float cost, float radius) {
        if (search.products) return cost - 1.001f * (w.norm[i] + M) * radius > nearest;
        return cost < kInfinity && __builtin_sqrtf(cost) > nearest + radius;
    };
    int64_t kept = 0, opened = 0;
    for (int64_t c = 0; c < count; ++c) {
        const int32_t clump = of_code[w.candidates[c]];
        if (clump < 0) {
            w.candidates[kept++] = w.candidates[c];
        } else if (all || !out_of_question(w.distance[c], clumps.radius[h * clumps.most + clump])) {
            w.opened[opened++] = clump;
        }
    }
    for (int64_t o = 0; o < opened; ++o) {
        const int64_t j = h * clumps.most + w.opened[o];
        const int64_t* begin = clumps.first + h * (clumps.most + 1) + w.opened[o];
        const int64_t width = kFloats * kClumpGroup, members = begin[1] - begin[0];
        const int64_t panels = (members + width - 1) / width, group = clumps.panel[j] - clumps.panel[h * clumps.most];
        if (with_margin) {  // the second nearest may be any of them
            for (int64_t s = 0; s < members; ++s) {
                w.candidates[kept++] = clumps.members[h * codebook.codes + begin[0] + s];
            }
            continue;
        }
        float* maxima = w.clump_maxima + group * kFloats;
        if (w.clump_tile[w.opened[o]] != tile) {
            w.clump_tile[w.opened[o]] = tile;
            for (int64_t p = 0; p < panels; ++p) {
                const int64_t vector = (clumps.panel[j] + p) * kClumpGroup * kFloats;
                scan<32>(w.words + tile * kRows * dim, nullptr, nullptr, clumps.panels.words + vector * dim,
                         clumps.panels.start + vector, 1, dim, kClumpGroup, maxima + p * kFloats, clumps.groups);
            }
        }
        const float radius = clumps.radius[j], norm = w.norm[i], Q = codebook.reach[h];
        const float unit = static_cast<float>(2 * dim + 16) * kUnit,
                    definition = static_cast<float>(dim + 4) * 0x1p-53f;
        const float error =
            1.001f * (search.products ? unit * radius * (norm + M) + definition * (norm + M) * (Q + radius + M)
                                      : unit * radius * (norm + Q + radius) + definition * (norm + Q) * (norm + Q)) +
            static_cast<float>(dim + 2) * 0x1p-120f;
        float errors[64 / kFloats];
        for (float& e : errors) e = error;
        maxima += i % kRows * clumps.groups;
        float least = -kInfinity;
        for (int64_t p = 0; p < panels; ++p) {
            const float of_panel = least_score(maxima + p * kFloats, errors, 1, false);
            least = least > of_panel ? least : of_panel;
        }
        for (int64_t p = 0; p < panels; ++p) {
            uint64_t bits = groups_above(maxima + p * kFloats, errors, 1, least);
            for (; bits != 0; bits &= bits - 1) {
                const int64_t first = (p * kFloats + __builtin_ctzll(bits)) * kClumpGroup;
                for (int64_t s = first; s < first + kClumpGroup && s < members; ++s) {
                    w.candidates[kept++] = clumps.members[h * codebook.codes + begin[0] + s];
                }
            }
        }
    }
    return kept;
}

inline bool finite(const float* x, int64_t dim) {
    bool all = true;
    for (int64_t d = 0; d < dim; ++d) all &= x[d] - x[d] == 0;
    return all;
}

inline void leave(const Unsettled& unsettled, int64_t h, int64_t rows, int64_t row) {
    int64_t at;
#pragma omp atomic capture
    at = unsettled.count[h]++;
    unsettled.rows[h * rows + at] = row;
}

// Rows begin..end of those to search in one head. Returns how many it left unsettled.
template <int kBits>
int64_t search_block(const Search& search, int64_t h, int64_t begin, int64_t end, const Workspace& w) {
    const Codebook& codebook = search.codebook;
    const int64_t dim = codebook.dim, group = codebook.group, stride = codebook.panels * kFloats;
    const int64_t panels = used_panels(codebook, h), errors = padded_panels(codebook);
    const int64_t* listed = search.rows.listed == nullptr ? nullptr : search.rows.listed + h * search.rows.rows;
    auto row_of = [&](int64_t i) { return listed == nullptr ? i : listed[i]; };
    auto x_of = [&](int64_t row) { return search.rows.x + (h * search.rows.rows + row) * dim; };

    for (int64_t first = begin; first < end; first += kRows) {
        const float* row[kRows];
        for (int r = 0; r < kRows; ++r) row[r] = x_of(row_of(first + r < end ? first + r : first));
        pack_tile<kBits>(search, h, row, first - begin, w);
    }
    const int64_t tiles = (end - begin + kRows - 1) / kRows;
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t panel = h * codebook.panels + p, vector = panel * group * kFloats;
        for (int64_t t = 0; t < tiles; ++t) {
            scan<kBits>(w.words + t * kRows * codebook.words, w.factor + t * kRows, w.offset + t * kRows,
                        codebook.scan.words + vector * codebook.words, codebook.scan.start + vector,
                        codebook.scan.scale[panel], codebook.words, group, w.maxima + t * kRows * stride + p * kFloats,
                        stride);
        }
    }
    const float definition = search.products ? 0 : static_cast<float>(dim + 4) * 0x1p-53f;
    for (int64_t i = 0; i < end - begin; ++i) {
        const float r = w.rounding[i], R = w.norm[i] + r;
        for (int64_t p = 0; p < panels; p += kFloats) {
            store(w.error + i * errors + p, load(codebook.by_rounding + h * errors + p) * r +
                                                load(codebook.by_norm + h * errors + p) * R +
                                                load(codebook.constant + h * errors + p) + definition * R * R);
        }
        w.threshold[i] = least_score(w.maxima + i * stride, w.error + i * errors, panels,
                                     wants_margin(search.out, row_of(begin + i)));
    }
    for (int64_t j = 0; j < codebook.clumps.most; ++j) w.clump_tile[j] = -1;
    int64_t left = 0;
    auto settle = [&](int64_t row, int32_t* candidates, float* distance, int64_t count, const Blur& blur) {
        if (count >= 0 && decide(search, h, row, candidates, distance, count, blur)) return;
        leave(*search.unsettled, h, search.rows.rows, row);
        ++left;
    };
    // rows with few candidates wait for each other, so that the latency of one decision hides behind the next
    struct {
        int64_t row, count;
        Blur blur;
        int32_t candidates[kFew + kMaxGroup];
        float distance[kFew + 4 + kFloats];
    } waiting[kWaiting];
    int64_t waits = 0;
    auto flush = [&] {
        for (int64_t j = 0; j < waits; ++j) {
            settle(waiting[j].row, waiting[j].candidates, waiting[j].distance, waiting[j].count, waiting[j].blur);
        }
        waits = 0;
    };
    for (int64_t i = 0; i < end - begin; ++i) {
        const int64_t row = row_of(begin + i);
        if (!(w.norm[i] < kInfinity) && !finite(x_of(row), dim)) {
            emit(search, h, row, 0, codebook.codes == 1 ? kInfinity : 0, __builtin_nanf(""));
            continue;
        }
        const float* maxima = w.maxima + i * stride;
        const float* error = w.error + i * errors;
        if (codebook.clumps.most == 0) {
            auto& few = waiting[waits];
            few.row = row;
            few.count = collect(search, h, w.threshold[i], maxima, error, panels, kFew, few.candidates);
            if (few.count >= 0) {
                few.blur = measure_candidates(search, h, row, w.norm[i], few.candidates, few.distance, few.count);
                if (++waits == kWaiting) flush();
                continue;
            }
        }
        int64_t count = collect(search, h, w.threshold[i], maxima, error, panels, search.limit, w.candidates);
        if (kBits == 32 && codebook.clumps.most > 0) count = open_clumps(search, h, row, i, w, count);
        Blur blur = {};
        if (count >= 0) blur = measure_candidates(search, h, row, w.norm[i], w.candidates, w.distance, count);
        settle(row, w.candidates, w.distance, count, blur);
    }
    flush();
    return left;
}

// Packs one code minus `mean`, its first word at `word`. Returns a bound on what integers leave out of it.
inline float pack_code(const float* row, const float* mean, int64_t dim, int bits, float scale, uint32_t* word) {
    if (bits < 32) {
        int32_t total;
        return norm_bound(to_integers(row, mean, dim, bits, scale, true, word, kFloats, &total), dim);
    }
    for (int64_t d = 0; d < dim; ++d) {
        const float value = row[d] - mean[d];
        std::memcpy(word + d * kFloats, &value, sizeof value);
    }
    return 0;
}

inline void pack_nothing(int64_t words, uint32_t* word, float* start) {
    for (int64_t j = 0; j < words; ++j) word[j * kFloats] = 0;
    *start = -kInfinity;
}

// (row - from).mean in float64.
inline double product_with_mean(const float* row, const float* from, const float* mean, int64_t dim) {
    constexpr int kDoubles = kFloats / 2;
    vdouble sum = {};
    int64_t d = 0;
    for (; d + kDoubles <= dim; d += kDoubles) {
        sum += load_doubles(mean + d) * (load_doubles(row + d) - load_doubles(from + d));
    }
    double total = 0;
    for (int lane = 0; lane < kDoubles; ++lane) total += sum[lane];
    for (; d < dim; ++d) total += static_cast<double>(mean[d]) * (static_cast<double>(row[d]) - from[d]);
    return total;
}

// A panel of slots, and the errors of its scores.
void pack_panel(const Codebook& codebook, int64_t h, int64_t p) {
    const int64_t dim = codebook.dim, group = codebook.group, width = kFloats * group;
    const int64_t panel = h * codebook.panels + p, slots = codebook.slots[h] - p * width;
    const int32_t* code = codebook.code + panel * width;
    const int32_t* clump = codebook.clumps.most == 0 ? nullptr : codebook.clumps.of_code + h * codebook.codes;
    const float* mean = codebook.mean + h * dim;
    const float* original = codebook.original + h * codebook.codes * dim;
    float largest = 0, q = 0, Q = 0, radius = 0;
    for (int64_t s = 0; s < width && s < slots; ++s) {
        float square;
        const float most = measure(original + code[s] * dim, mean, dim, &square);
        largest = largest > most ? largest : most;
        if (clump != nullptr && clump[code[s]] >= 0) {
            const float reach = codebook.clumps.radius[h * codebook.clumps.most + clump[code[s]]];
            radius = radius > reach ? radius : reach;
        }
    }
    const bool fits = largest >= kSmallest, products = codebook.metric == Metric::product;
    const bool integers = codebook.bits < 32;
    const float scale = integers && fits ? largest / most_of(codebook.bits) : 1;
    for (int64_t s = 0; s < width; ++s) {
        const int64_t lane = s / group, v = s % group;
        uint32_t* word = codebook.scan.words + (panel * group + v) * codebook.words * kFloats + lane;
        float* start = codebook.scan.start + (panel * group + v) * kFloats + lane;
        if (s >= slots) {
            pack_nothing(codebook.words, word, start);
            continue;
        }
        const float* row = original + code[s] * dim;
        float square;
        measure(row, mean, dim, &square);
        *start = products ? static_cast<float>(product_with_mean(row, mean, mean, dim)) : -0.5f * square;
        const float norm = norm_bound(square, dim);
        const float rounding = pack_code(row, mean, dim, codebook.bits, scale, word);
        Q = Q > norm ? Q : norm;
        q = q > rounding ? q : rounding;
    }
    if (integers && !fits) q = kInfinity;  // too small for integers
    Q += q;
    const float unit = static_cast<float>(integers ? dim + 16 : 2 * dim + 16) * kUnit;
    const float definition = static_cast<float>(dim + 4) * 0x1p-53f, slack = 1.001f;
    const int64_t at = h * padded_panels(codebook) + p;
    codebook.scan.scale[panel] = scale;
    codebook.by_rounding[at] = integers ? slack * Q : 0;  // float32 rows are not rounded, and infinity times 0 is NaN
    const float underflow = static_cast<float>(dim + 2) * 0x1p-120f;
    if (products) {
        const float M = codebook.mean_length[h], of_definition = definition * (Q + radius + M);
        codebook.by_norm[at] = slack * (q + radius + unit * Q + of_definition);
        codebook.constant[at] = slack * (M * (radius + unit * Q + of_definition)) + underflow;
        return;
    }
    codebook.by_norm[at] = slack * (q + radius + unit * Q + 2 * definition * Q);
    codebook.constant[at] = slack * (Q * radius + (0.5f * unit + definition) * Q * Q) + underflow;
}

// The members of a clump as differences from the first of them.
void pack_clump(const Codebook& codebook, int64_t h, int64_t j) {
    const Clumps& clumps = codebook.clumps;
    const int64_t dim = codebook.dim, width = kFloats * kClumpGroup;
    const int64_t* begin = clumps.first + h * (clumps.most + 1) + j;
    const int32_t* member = clumps.members + h * codebook.codes + begin[0];
    const float* original = codebook.original + h * codebook.codes * dim;
    const float* mean = codebook.mean + h * dim;
    const int64_t members = begin[1] - begin[0];
    float radius = 0;
    for (int64_t i = 0; i < (members + width - 1) / width * width; ++i) {
        const int64_t panel = clumps.panel[h * clumps.most + j] + i / width;
        const int64_t lane = i % width / kClumpGroup, vector = panel * kClumpGroup + i % kClumpGroup;
        uint32_t* word = clumps.panels.words + vector * dim * kFloats + lane;
        float* start = clumps.panels.start + vector * kFloats + lane;
        if (i >= members) {
            pack_nothing(dim, word, start);
            continue;
        }
        const float* first = original + member[0] * dim;
        const float* row = original + member[i] * dim;
        float square;
        measure(row, first, dim, &square);
        pack_code(row, first, dim, 32, 1, word);
        if (codebook.metric == Metric::product) {
            *start = static_cast<float>(product_with_mean(row, first, mean, dim));
        } else {
            double along = 0;
            for (int64_t d = 0; d < dim; ++d) {
                along += (static_cast<double>(first[d]) - mean[d]) * (static_cast<double>(row[d]) - first[d]);
            }
            *start = -static_cast<float>(along + 0.5 * square);
        }
        const float reach = norm_bound(square, dim);
        radius = radius > reach ? radius : reach;
    }
    clumps.radius[h * clumps.most + j] = radius;
}

}  // namespace

int64_t codebook_lanes() { return kFloats; }

int screen_bits(int64_t dim) {
    if (!kScreens || dim < 8 || dim > kWide) return 32;
    return dim <= kNarrow ? 16 : 8;
}

void measure_codes(const Codebook& codebook, float* squares) {
    const int64_t dim = codebook.dim, width = kFloats * codebook.group;
    for (int64_t h = 0; h < codebook.heads; ++h) {
        const int32_t* code = codebook.code + h * codebook.panels * width;
        float reach = 0;
#pragma omp parallel for schedule(static) reduction(max : reach) if (codebook.slots[h] * dim > 1 << 15)
        for (int64_t s = 0; s < codebook.slots[h]; ++s) {
            float square;
            measure(codebook.original + (h * codebook.codes + code[s]) * dim, codebook.mean + h * dim, dim, &square);
            squares[h * codebook.codes + code[s]] = square;
            const float norm = norm_bound(square, dim);
            reach = reach > norm ? reach : norm;
            if (codebook.metric == Metric::product) {
                codebook.length[h * codebook.codes + code[s]] =
                    length(codebook.original + (h * codebook.codes + code[s]) * dim, dim);
            }
        }
        codebook.reach[h] = reach;
        if (codebook.metric != Metric::product) continue;
        codebook.mean_length[h] = length(codebook.mean + h * dim, dim);
        float most = 0, sum = 0;
        for (int64_t s = 0; s < codebook.slots[h]; ++s) {
            const float of_code = codebook.length[h * codebook.codes + code[s]];
            most = of_code > most ? of_code : most;
            sum += of_code;
        }
        const bool alike = most * static_cast<float>(codebook.slots[h]) <= 4 * sum && most < kInfinity;
        codebook.one_length[h] = alike ? most : 0;
    }
}

void pack_codebook(const Codebook& codebook) {
    const bool large = codebook.heads * codebook.codes * codebook.dim > 1 << 15;
    if (codebook.clumps.most > 0) {
#pragma omp parallel for schedule(dynamic) if (large)
        for (int64_t i = 0; i < codebook.heads * codebook.clumps.most; ++i) {
            pack_clump(codebook, i / codebook.clumps.most, i % codebook.clumps.most);
        }
    }
#pragma omp parallel for schedule(static) if (large)
    for (int64_t i = 0; i < codebook.heads * codebook.panels; ++i) {
        const int64_t h = i / codebook.panels, p = i % codebook.panels;
        if (p < used_panels(codebook, h)) pack_panel(codebook, h, p);
    }
    // what no panel uses is read with whole vectors of errors
    for (int64_t h = 0; h < codebook.heads; ++h) {
        for (int64_t p = used_panels(codebook, h); p < padded_panels(codebook); ++p) {
            const int64_t at = h * padded_panels(codebook) + p;
            codebook.by_rounding[at] = codebook.by_norm[at] = codebook.constant[at] = 0;
        }
    }
}

int64_t search_scratch(const Codebook& codebook) { return carve(nullptr, codebook).size + 64; }

void nearest_codeword_f32(const Codebook& codebook, const SearchRows& rows, int threads, void* scratch,
                          const SearchOutput& out, const Unsettled* unsettled) {
    // beyond the limit, distances would cost more than half a search in float32
    const int64_t eighth = codebook.codes / 8, limit = unsettled == nullptr ? INT64_MAX : eighth > 32 ? eighth : 32;
    const Search search = {codebook, rows, out, unsettled, codebook.metric == Metric::product, limit};
    const int64_t block = block_rows(codebook.words), blocks = (rows.rows + block - 1) / block;
    const int64_t bytes = search_scratch(codebook);
    int64_t tried = 0, left = 0;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        char* mine = static_cast<char*>(scratch) + omp_get_thread_num() * bytes;
#else
        char* mine = static_cast<char*>(scratch);
#endif
        mine = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(mine) + 63) / 64 * 64);
        const Workspace w = carve(mine, codebook);
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < codebook.heads * blocks; ++task) {
            const int64_t h = task / blocks, begin = task % blocks * block;
            const int64_t count = rows.listed == nullptr ? rows.rows : rows.count[h];
            const int64_t end = begin + block < count ? begin + block : count;
            if (begin >= end) continue;
            if (unsettled == nullptr) {
                search_block<32>(search, h, begin, end, w);
                continue;
            }
            if constexpr (kScreens) {
                int64_t so_far, given_up;
#pragma omp atomic read
                so_far = tried;
#pragma omp atomic read
                given_up = left;
                if (so_far >= 4 * block && 4 * given_up > so_far) {  // integers do not tell these codes apart
                    for (int64_t i = begin; i < end; ++i) leave(*unsettled, h, rows.rows, i);
                    recheck(out, end - begin);
                    continue;
                }
                const int64_t more = codebook.bits == 8 ? search_block<8>(search, h, begin, end, w)
                                                        : search_block<16>(search, h, begin, end, w);
                recheck(out, more);
#pragma omp atomic
                left += more;
#pragma omp atomic
                tried += end - begin;
            }
        }
    }
}

}  // namespace metarec::METAREC_ISA
