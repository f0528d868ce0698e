// Nearest codeword: scores with a proven error for all codes, then true distances for the few that can still win.
//
// With m the mean code, X = x - m and C = c - m, the code of least ||x - c||^2 has the largest score
// s = X.C - ||C||^2 / 2. The scan computes scores S from approximations x' of X and c' of C, either float32 or 8-bit
// integers times a scale, and keeps for each row the largest score of every group of codes. With R >= ||X||, ||x'||,
// r >= ||X - x'||, Q >= ||C||, ||c'||, q >= ||C - c'|| over all codes and u = 2^-24,
//     |S - s| <= E = r Q + R q + k u (R Q + Q^2 / 2) + f (R + Q)^2 + underflow.
// k: float32 arithmetic. A sum of dim products, fused or not, rounds partial sums of magnitude at most R Q + Q^2 / 2 dim
//   times, and ||C||^2 / 2 is such a sum: k = 2 dim + 16 covers both, the roundings of X and C, and a product alone.
//   Integer sums are exact; their conversion, scale and the sum with -||C||^2 / 2 leave k = dim + 16.
// f = (dim + 4) 2^-53: the float64 sum that defines the index differs from the real distance by up to 2 f (R + Q)^2.
// A code of a group whose largest S is below the largest of all by more than 2 E cannot be the nearest. For the codes
// left, d = sum (x - c)^2 in float32 is within (dim + 8) u d of the distance: mostly that proves the nearest. If not,
// those that can still win are compared by the definition itself, in float64 (exact.cpp).
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
constexpr float kIntegers = 127;     // an approximation in integers is at most this
constexpr float kSmallest = 0x1p-60f;  // below this largest element, integers are left to float32
constexpr int kScale = 0, kReach = 1, kRounding = 2;  // of Panels::bounds
constexpr int64_t kBounds = 4;

// Rows of a block: packed rows stay in L1 while one panel after the other passes over them; longer rows stay in L2,
// and more of them share each panel.
inline int64_t block_rows(int64_t words) { return words <= 32 || words > 128 ? 96 : 48; }

struct Search {
    const Codebook& codebook;
    const Panels& panels;
    const SearchRows& rows;
    const SearchOutput& out;
    const Unsettled* unsettled;
    int64_t limit;  // codes whose distances are worth computing before a search in float32 would be cheaper
};

// What a thread works with, carved from its scratch. Arrays of a block: [tiles, ...].
struct Workspace {
    uint32_t* words;    // [tiles, words, kRows]
    float* norm;        // [rows] at least ||x - m||
    float* rounding;    // [rows] at least ||x - m - x'||
    float* factor;      // [rows] scale of the integer sums
    int32_t* offset;    // [rows] what unsigned codes add to them, negated
    float* maxima;      // [rows, panels * lanes]
    float* threshold;   // [rows] groups that reach it may hold the nearest code
    int32_t* bounded;   // [rows] whether the error of the scores is finite
    int32_t* candidates;  // [slots]
    float* distance;      // [slots], padded
    int64_t size;
};

inline Workspace carve(char* memory, const Codebook& codebook, int64_t words) {
    int64_t used = 0;
    auto take = [&](int64_t elements) {
        char* at = memory + used;
        used += (elements * 4 + 63) / 64 * 64;
        return at;
    };
    const int64_t block = block_rows(words), slots = codebook.panels * codebook.lanes * codebook.group;
    Workspace w;
    w.words = reinterpret_cast<uint32_t*>(take(block * words));
    w.norm = reinterpret_cast<float*>(take(block));
    w.rounding = reinterpret_cast<float*>(take(block));
    w.factor = reinterpret_cast<float*>(take(block));
    w.offset = reinterpret_cast<int32_t*>(take(block));
    w.threshold = reinterpret_cast<float*>(take(block));
    w.bounded = reinterpret_cast<int32_t*>(take(block));
    w.maxima = reinterpret_cast<float*>(take(block * codebook.panels * codebook.lanes));
    w.candidates = reinterpret_cast<int32_t*>(take(slots + kMaxGroup));
    w.distance = reinterpret_cast<float*>(take(slots + 4 + kFloats));
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

// row - mean in integers of `scale`, four to a word, `step` words apart; flip = 0x80808080 adds 128 to each.
// Returns the squared norm of what they leave out, and sets `total` to the integers' sum.
inline float to_integers(const float* row, const float* mean, int64_t dim, float scale, uint32_t flip, uint32_t* out,
                         int64_t step, int32_t* total) {
    const float round = 12582912.0f;  // 1.5 * 2^23: the sum's lowest byte is the nearest integer
    const float inverse = 1 / scale;
    vfloat square = {}, sum = {};
    for (int64_t d = 0; d < dim; d += kFloats) {
        const vfloat x = load_first(row + d, dim - d) - load_first(mean + d, dim - d);
        const vfloat shifted = x * inverse + round;
        const vfloat integer = shifted - round;
        const vfloat error = x - integer * scale;
        square += error * error;
        sum += integer;
        uint32_t words[kFloats / 4];
#if defined(METAREC_ISA_avx512)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm512_cvtepi32_epi8((__m512i)shifted));
#else
        uint8_t bytes[kFloats];
        for (int lane = 0; lane < kFloats; ++lane) bytes[lane] = static_cast<uint8_t>(((vint)shifted)[lane]);
        std::memcpy(words, bytes, sizeof bytes);
#endif
        for (int w = 0; w < kFloats / 4 && d + 4 * w < dim; ++w) out[(d / 4 + w) * step] = words[w] ^ flip;
    }
    *total = static_cast<int32_t>(sum_lanes(sum));
    return sum_lanes(square);
}

// Rows of a tile as words [count, kRows]; rows beyond `rows` repeat the first.
template <bool kInteger>
inline void pack_tile(const Search& search, int64_t h, const float* const* row, int64_t first, const Workspace& w) {
    const Codebook& codebook = search.codebook;
    const int64_t dim = codebook.dim;
    const float* mean = codebook.mean + h * dim;
    uint32_t* words = w.words + first * search.panels.count;
    if constexpr (kInteger) {
        const float code_scale = search.panels.bounds[h * kBounds + kScale];
        for (int r = 0; r < kRows; ++r) {
            float square;
            const float largest = measure(row[r], mean, dim, &square);
            // too small or too large: the row is left to float32
            const bool fits = largest >= kSmallest && square <= kMaxSquare;
            const float scale = fits ? largest / kIntegers : 1;
            int32_t total;
            const float rest = to_integers(row[r], mean, dim, scale, 0, words + r, kRows, &total);
            w.norm[first + r] = norm_bound(square, dim);
            w.rounding[first + r] = fits ? norm_bound(rest, dim) : kInfinity;
            w.factor[first + r] = scale * code_scale;
            w.offset[first + r] = -128 * total;
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
template <bool kInteger>
[[gnu::always_inline]] inline void scan(const uint32_t* __restrict rows, const float* factor, const int32_t* offset,
                                        const uint32_t* __restrict words, const float* start, int64_t count,
                                        int64_t group, float* maxima, int64_t stride) {
    const int64_t vector = count * kFloats;
    for (int64_t v = 0; v < group; v += kVectors, words += kVectors * vector, start += kVectors * kFloats) {
        vfloat score[kRows][kVectors];
        const uint32_t* row = rows;
        const uint32_t* code = words;
        if constexpr (kInteger) {
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
                        sum[r][j] = (vint)_mm512_dpbusd_epi32((__m512i)sum[r][j], codes[j], value);
                    }
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j) {
                    score[r][j] = __builtin_convertvector(sum[r][j], vfloat) * broadcast(factor[r]) +
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

inline void emit(const Search& search, int64_t h, int64_t row, int64_t index, float margin, float row_error) {
    const int64_t at = h * search.rows.rows + row, dim = search.codebook.dim;
    search.out.indices[at] = index;
    if (search.out.margin != nullptr) search.out.margin[at] = margin;
    if (search.out.quantized == nullptr) return;
    search.out.row_error[at] = row_error;
    const float* __restrict code = search.codebook.original + (h * search.codebook.codes + index) * dim;
    float* __restrict quantized = search.out.quantized + at * dim;
    for (int64_t d = 0; d < dim; ++d) quantized[d] = code[d];
}

// Squared distances of x from four codes.
inline void distances(const float* x, const float* const* code, int64_t dim, float* out) {
    vfloat sum[4] = {};
    int64_t d = 0;
    for (; d + kFloats <= dim; d += kFloats) {
        const vfloat value = load(x + d);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const vfloat error = value - load(code[j] + d);
            sum[j] += error * error;
        }
    }
    if (d < dim) {
        const vfloat value = load_first(x + d, dim - d);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const vfloat error = value - load_first(code[j] + d, dim - d);
            sum[j] += error * error;
        }
    }
    sum_lanes(sum, out);
}

// Squared distance in float64, in no particular order.
inline double accurate_distance(const float* x, const float* code, int64_t dim) {
    constexpr int kDoubles = kFloats / 2;
    vdouble sum = {};
    int64_t d = 0;
    for (; d + kDoubles <= dim; d += kDoubles) {
        const vdouble error = load_doubles(x + d) - load_doubles(code + d);
        sum += error * error;
    }
    double total = 0;
    for (int lane = 0; lane < kDoubles; ++lane) total += sum[lane];
    for (; d < dim; ++d) {
        const double error = static_cast<double>(x[d]) - code[d];
        total += error * error;
    }
    return total;
}

// The least of `count` distances, padded with infinities to a whole vector.
inline float least_of(const float* distance, int64_t count) {
    vfloat least = broadcast(kInfinity);
    for (int64_t i = 0; i < count; i += kFloats) least = min(load(distance + i), least);
    return min_lane(least);
}

// Decide one row by the distances of `count` codes, in ascending order, among which the nearest is (and the second
// nearest, if the margin is wanted).
void decide(const Search& search, int64_t h, int64_t row, int32_t* candidates, float* distance, int64_t count) {
    const Codebook& codebook = search.codebook;
    const int64_t dim = codebook.dim;
    const float* x = search.rows.x + (h * search.rows.rows + row) * dim;
    const float* original = codebook.original + h * codebook.codes * dim;
    for (int64_t i = 0; i < count; i += 4) {
        const float* code[4];
        for (int64_t j = 0; j < 4; ++j) code[j] = original + candidates[i + j < count ? i + j : i] * dim;
        distances(x, code, dim, distance + i);
    }
    store(distance + count, broadcast(kInfinity));
    const float relative = 3 * static_cast<float>(dim + 8) * kUnit, absolute = static_cast<float>(dim) * 0x1p-122f;
    const float least = least_of(distance, count), reach = least + (relative * least + absolute);
    int64_t possible = 0, best = 0;
    for (int64_t i = 0; i < count; i += kFloats) {
        const uint32_t bits = lanes_at_least(broadcast(reach), load(distance + i));
        possible += __builtin_popcount(bits);
        best = bits != 0 ? i + __builtin_ctz(bits) : best;
    }
    if (possible == 1) {
        const int32_t index = candidates[best];
        float margin = 0;
        if (search.out.margin != nullptr) {
            distance[best] = kInfinity;
            const float second = least_of(distance, count), near = second + (relative * second + absolute);
            double following = __builtin_inf();
            for (int64_t i = 0; i < count; ++i) {
                if (i == best || distance[i] > near) continue;
                const double d = accurate_distance(x, original + candidates[i] * dim, dim);
                following = d < following ? d : following;
            }
            if (!codebook.duplicated[h * codebook.codes + index]) {
                margin = static_cast<float>(following - accurate_distance(x, original + index * dim, dim));
            }
        }
        emit(search, h, row, index, margin, least);
        return;
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (search.out.margin != nullptr || !(distance[i] > reach)) candidates[kept++] = candidates[i];
    }
    Nearest nearest = {__builtin_inf(), __builtin_inf(), -1};
    offer_exact_f32(&nearest, x, original, candidates, kept, dim);
    float margin = codebook.codes == 1 ? kInfinity : 0;  // every distance is infinite
    if (nearest.index >= 0 && !codebook.duplicated[h * codebook.codes + nearest.index]) {
        margin = static_cast<float>(nearest.second - nearest.least);
    }
    const int64_t index = nearest.index < 0 ? 0 : nearest.index;
    const float* code[4];
    for (int j = 0; j < 4; ++j) code[j] = original + index * dim;
    float row_error[4];
    distances(x, code, dim, row_error);
    emit(search, h, row, index, margin, row_error[0]);
}

// The largest of `groups` maxima, or the second largest: no more than the score of the nearest or second nearest code.
inline float least_score(const float* maxima, int64_t groups, bool of_second) {
    vfloat best = broadcast(-kInfinity), second = best;
    if (!of_second) {
        for (int64_t g = 0; g < groups; g += kFloats) best = max(best, load(maxima + g));
        return max_lane(best);
    }
    for (int64_t g = 0; g < groups; g += kFloats) {
        const vfloat score = load(maxima + g);
        second = max(second, min(best, score));
        best = max(best, score);
    }
#pragma GCC unroll 4
    for (int distance = kFloats / 2; distance > 0; distance /= 2) {
        const vfloat other = swap_lanes(best, distance);
        second = max(max(second, swap_lanes(second, distance)), min(best, other));
        best = max(best, other);
    }
    return second[0];
}

// Codes of the groups that reach the threshold. Returns how many, or -1 if that is more than the search's limit.
inline int64_t collect(const Search& search, int64_t h, float threshold, const float* maxima, int64_t groups,
                       int32_t* candidates) {
    constexpr int kAtOnce = 64 / kFloats;  // vectors whose lanes fill a word
    const Codebook& codebook = search.codebook;
    const int64_t group = codebook.group, slots = codebook.slots[h];
    const int32_t* code = codebook.code + h * codebook.panels * codebook.lanes * group;
    int64_t count = 0;
    for (int64_t g = 0; g < groups; g += 64) {
        uint64_t bits = 0;
        for (int v = 0; v < kAtOnce && g + v * kFloats < groups; ++v) {
            bits |= static_cast<uint64_t>(lanes_at_least(load(maxima + g + v * kFloats), broadcast(threshold)))
                    << (v * kFloats);
        }
        for (; bits != 0; bits &= bits - 1) {
            const int64_t first = (g + __builtin_ctzll(bits)) * group;
            if (count + group > search.limit) return -1;
            // as many as the largest group has: what is too much is not counted
            std::memcpy(candidates + count, code + first, kMaxGroup * sizeof *code);
            count += first + group <= slots ? group : first < slots ? slots - first : 0;
        }
    }
    return count;
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
template <bool kInteger>
int64_t search_block(const Search& search, int64_t h, int64_t begin, int64_t end, const Workspace& w) {
    const Codebook& codebook = search.codebook;
    const Panels& panels = search.panels;
    const int64_t dim = codebook.dim, group = codebook.group, stride = codebook.panels * codebook.lanes;
    const int64_t* listed = search.rows.listed == nullptr ? nullptr : search.rows.listed + h * search.rows.rows;
    auto row_of = [&](int64_t i) { return listed == nullptr ? i : listed[i]; };

    for (int64_t first = begin; first < end; first += kRows) {
        const float* row[kRows];
        for (int r = 0; r < kRows; ++r) {
            row[r] = search.rows.x + (h * search.rows.rows + row_of(first + r < end ? first + r : first)) * dim;
        }
        pack_tile<kInteger>(search, h, row, first - begin, w);
    }
    const int64_t tiles = (end - begin + kRows - 1) / kRows;
    for (int64_t p = 0; p < used_panels(codebook, h); ++p) {
        const int64_t vectors = (h * codebook.panels + p) * group;
        for (int64_t t = 0; t < tiles; ++t) {
            scan<kInteger>(w.words + t * kRows * panels.count, w.factor + t * kRows, w.offset + t * kRows,
                           panels.words + vectors * panels.count * kFloats, panels.start + vectors * kFloats,
                           panels.count, group, w.maxima + t * kRows * stride + p * kFloats, stride);
        }
    }
    const float* bounds = panels.bounds + h * kBounds;
    const float arithmetic = static_cast<float>(kInteger ? dim + 16 : 2 * dim + 16) * kUnit;
    const float definition = static_cast<float>(dim + 4) * 0x1p-53f;
    const float underflow = static_cast<float>(dim + 2) * 0x1p-120f;
    const int64_t groups = used_panels(codebook, h) * codebook.lanes;
    for (int64_t i = 0; i < end - begin; ++i) {
        const float r = w.rounding[i], R = w.norm[i] + r, q = bounds[kRounding], Q = bounds[kReach] + q;
        const float error =
            1.001f * (r * Q + R * q + arithmetic * (R * Q + 0.5f * Q * Q) + definition * (R + Q) * (R + Q)) + underflow;
        w.threshold[i] = least_score(w.maxima + i * stride, groups, search.out.margin != nullptr) - 2 * error;
        w.bounded[i] = error < kInfinity;
    }
    int64_t left = 0;
    for (int64_t i = 0; i < end - begin; ++i) {
        const int64_t row = row_of(begin + i);
        int64_t count = -1;
        if (w.bounded[i]) {
            count = collect(search, h, w.threshold[i], w.maxima + i * stride, groups, w.candidates);
        } else if (!kInteger) {
            if (!finite(search.rows.x + (h * search.rows.rows + row) * dim, dim)) {
                emit(search, h, row, 0, codebook.codes == 1 ? kInfinity : 0, __builtin_nanf(""));
                continue;
            }
            count = codebook.slots[h];
            std::memcpy(w.candidates, codebook.code + h * codebook.panels * kFloats * group, count * sizeof(int32_t));
        }
        if (count < 0) {
            leave(*search.unsettled, h, search.rows.rows, row);
            ++left;
        } else {
            decide(search, h, row, w.candidates, w.distance, count);
        }
    }
    return left;
}

}  // namespace

int64_t codebook_lanes() { return kFloats; }

bool screens(int64_t dim) { return kScreens && dim > 8 && dim <= 32768; }

int64_t panel_words(int64_t dim, bool screen) { return screen ? (dim + 3) / 4 : dim; }

void pack_panels(const Codebook& codebook, bool screen, const Panels& panels) {
    const int64_t dim = codebook.dim, group = codebook.group, width = kFloats * group, words = panels.count;
    for (int64_t h = 0; h < codebook.heads; ++h) {
        const float* mean = codebook.mean + h * dim;
        const int32_t* code = codebook.code + h * codebook.panels * width;
        const float* original = codebook.original + h * codebook.codes * dim;
        const int64_t slots = codebook.slots[h];
        const bool large = slots * dim > 1 << 14;
        float largest = 0, reach = 0, rounding = 0;
        if (screen) {
#pragma omp parallel for schedule(static) reduction(max : largest) if (large)
            for (int64_t s = 0; s < slots; ++s) {
                float square;
                const float most = measure(original + code[s] * dim, mean, dim, &square);
                largest = largest > most ? largest : most;
            }
        }
        const float scale = largest >= kSmallest ? largest / kIntegers : 1;
#pragma omp parallel for schedule(static) reduction(max : reach, rounding) if (large)
        for (int64_t p = 0; p < used_panels(codebook, h); ++p) {
            uint32_t* out = panels.words + (h * codebook.panels + p) * width * words;
            float* start = panels.start + (h * codebook.panels + p) * width;
            for (int64_t i = 0; i < width; ++i) {
                const int64_t s = p * width + i, lane = i / group, v = i % group;
                uint32_t* word = out + v * words * kFloats + lane;
                if (s >= slots) {
                    for (int64_t j = 0; j < words; ++j) word[j * kFloats] = 0;
                    start[v * kFloats + lane] = -kInfinity;
                    continue;
                }
                const float* row = original + code[s] * dim;
                float square;
                measure(row, mean, dim, &square);
                start[v * kFloats + lane] = -0.5f * square;
                const float norm = norm_bound(square, dim);
                reach = reach > norm ? reach : norm;
                if (screen) {
                    int32_t total;
                    const float rest = to_integers(row, mean, dim, scale, 0x80808080u, word, kFloats, &total);
                    const float off = norm_bound(rest, dim);
                    rounding = rounding > off ? rounding : off;
                } else {
                    for (int64_t d = 0; d < dim; ++d) {
                        const float value = row[d] - mean[d];
                        std::memcpy(word + d * kFloats, &value, sizeof value);
                    }
                }
            }
        }
        float* bounds = panels.bounds + h * kBounds;
        bounds[kScale] = scale;
        bounds[kReach] = reach;
        bounds[kRounding] = screen && largest < kSmallest ? kInfinity : rounding;
    }
}

int64_t search_scratch(const Codebook& codebook, const Panels& panels) {
    return carve(nullptr, codebook, panels.count).size + 64;
}

void nearest_codeword_f32(const Codebook& codebook, const Panels& panels, const SearchRows& rows, int threads,
                          void* scratch, const SearchOutput& out, const Unsettled* unsettled) {
    // beyond the limit, distances would cost more than half a search in float32
    const int64_t eighth = codebook.codes / 8, limit = unsettled == nullptr ? INT64_MAX : eighth > 32 ? eighth : 32;
    const Search search = {codebook, panels, rows, out, unsettled, limit};
    const int64_t block = block_rows(panels.count), blocks = (rows.rows + block - 1) / block;
    const int64_t bytes = search_scratch(codebook, panels);
    int64_t tried = 0, left = 0;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        char* mine = static_cast<char*>(scratch) + omp_get_thread_num() * bytes;
#else
        char* mine = static_cast<char*>(scratch);
#endif
        mine = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(mine) + 63) / 64 * 64);
        const Workspace w = carve(mine, codebook, panels.count);
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < codebook.heads * blocks; ++task) {
            const int64_t h = task / blocks, begin = task % blocks * block;
            const int64_t count = rows.listed == nullptr ? rows.rows : rows.count[h];
            const int64_t end = begin + block < count ? begin + block : count;
            if (begin >= end) continue;
            if (unsettled == nullptr) {
                search_block<false>(search, h, begin, end, w);
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
                    continue;
                }
                const int64_t more = search_block<true>(search, h, begin, end, w);
#pragma omp atomic
                left += more;
#pragma omp atomic
                tried += end - begin;
            }
        }
    }
}

}  // namespace metarec::METAREC_ISA
