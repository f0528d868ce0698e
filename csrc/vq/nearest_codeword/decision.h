// The final decision between the codes that the scan left: by float32 costs where their errors allow, else in float64.
#pragma once

#include "vq/exact.h"
#include "vq/nearest_codeword/search.h"

namespace metarec::METAREC_ISA {
namespace {

constexpr int64_t kPossible = 8;  // codes that a screen leaves to float64

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

// A bound on the error of the difference of two measured costs: relative * cost + absolute.
struct CostError {
    float relative, absolute;
    double of_float64;  // the same of products that are summed in float64, beside the definition's own error
    float reach(float cost) const { return cost + (relative * cost + absolute); }
};

// Measure the costs of candidates; norm is at least ||x - mean||.
inline CostError measure_candidates(const Search& search, int64_t h, int64_t row, float norm, const int32_t* candidates,
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
        for (int64_t i = 0; i < count; ++i) distance[i] = 0;  // all equal: float32 decides nothing
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

// Decides one row by the measured costs of `count` codes, which include the nearest (and the second nearest, if the
// margin is wanted). Returns false, in a screen, if float64 would have to compare many codes.
bool decide(const Search& search, int64_t h, int64_t row, int32_t* candidates, float* distance, int64_t count,
            const CostError& cost_error) {
    const Codebook& codebook = search.codebook;
    const int64_t dim = codebook.dim;
    const float* x = search.rows.x + (h * search.rows.rows + row) * dim;
    const float* original = codebook.original + h * codebook.codes * dim;
    const float least = least_of(distance, count), reach = cost_error.reach(least);
    // the squared error of a code, given its cost
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
            const float second = least_of(distance, count), near = cost_error.reach(second);
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
    if (search.unresolved != nullptr && possible > kPossible) return false;
    if (search.rows.listed == nullptr) recheck(search.out, 1);  // those listed were counted by the first pass
    const bool with_margin = wants_margin(search.out, row);
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (with_margin || !(distance[i] > reach)) {
            distance[kept] = distance[i];
            candidates[kept++] = candidates[i];
        }
    }
    if (!with_margin && least < kInfinity && cost_error.absolute < kInfinity) {
        // float64 in any order separates all but ties
        double nearest = __builtin_inf(), following = __builtin_inf();
        for (int64_t i = 0; i < kept; ++i) {
            const double d = accurate_cost(search, x, original + candidates[i] * dim),
                         loser = d < nearest ? nearest : d;
            best = d < nearest ? i : best;
            nearest = d < nearest ? d : nearest;
            following = loser < following ? loser : following;
        }
        const double tolerance =
            search.products ? cost_error.of_float64 : static_cast<double>(dim + 8) * 0x1p-51 * following;
        if (following - nearest > tolerance) {
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

}  // namespace
}  // namespace metarec::METAREC_ISA
