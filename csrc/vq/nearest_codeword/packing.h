// Norms with their rounding errors, and vectors as the words that the scan reads.
#pragma once

#include "vq/nearest_codeword/search.h"

namespace metarec::METAREC_ISA {
namespace {

constexpr int64_t kNarrow = 12;   // up to so many elements are screened in 16 bits: they tell codes apart by little
constexpr int64_t kWide = 32768;  // more are not screened: sums of products, 127 * 255 each, might overflow
// The largest integer: kNarrow products of 16 bits are summed without overflow.
constexpr float most_of(int bits) { return bits == 8 ? 127 : 8191; }
constexpr float kSmallest = 0x1p-56f;  // below this largest element, integers are left to float32

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

}  // namespace
}  // namespace metarec::METAREC_ISA
