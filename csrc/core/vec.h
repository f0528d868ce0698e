// Vectors of one instruction set, by the compiler's vector extension: one body serves SSE2, AVX2, AVX-512 and NEON.
// Include only from files in KERNELS (CMakeLists.txt), which define METAREC_ISA. Such files use no std templates:
// their weak symbols would carry this instruction set into code that runs on every processor.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(METAREC_ISA_avx512) || defined(METAREC_ISA_avx2)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(METAREC_ISA_avx512)
#define METAREC_VECTOR_BYTES 64
#elif defined(METAREC_ISA_avx2)
#define METAREC_VECTOR_BYTES 32
#else
#define METAREC_VECTOR_BYTES 16
#endif

namespace metarec::METAREC_ISA {
namespace {

constexpr int kFloats = METAREC_VECTOR_BYTES / 4;  // float lanes of a vector

typedef float vfloat __attribute__((vector_size(METAREC_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(METAREC_VECTOR_BYTES)));

typedef double vdouble __attribute__((vector_size(METAREC_VECTOR_BYTES)));

[[maybe_unused]] inline vfloat load(const float* p) {
    vfloat v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
[[maybe_unused]] inline vdouble load(const double* p) {
    vdouble v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
[[maybe_unused]] inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
[[maybe_unused]] inline vfloat broadcast(float x) { return x - vfloat{}; }
[[maybe_unused]] inline vdouble broadcast(double x) { return x - vdouble{}; }

// a b + c with one rounding if the instruction set can, in vectors and alone: element for element the same bits.
#if defined(METAREC_ISA_avx512)
[[maybe_unused]] inline vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
    return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
[[maybe_unused]] inline vdouble multiply_add(vdouble a, vdouble b, vdouble c) {
    return (vdouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(METAREC_ISA_avx2)
[[maybe_unused]] inline vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
    return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
[[maybe_unused]] inline vdouble multiply_add(vdouble a, vdouble b, vdouble c) {
    return (vdouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
[[maybe_unused]] inline vfloat multiply_add(vfloat a, vfloat b, vfloat c) { return a * b + c; }
[[maybe_unused]] inline vdouble multiply_add(vdouble a, vdouble b, vdouble c) { return a * b + c; }
#endif
#if defined(METAREC_ISA_avx512) || defined(METAREC_ISA_avx2)
[[maybe_unused]] inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
[[maybe_unused]] inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
[[maybe_unused]] inline float multiply_add(float a, float b, float c) { return a * b + c; }
[[maybe_unused]] inline double multiply_add(double a, double b, double c) { return a * b + c; }
#endif

[[maybe_unused]] inline vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }
[[maybe_unused]] inline vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }

// The first `count` floats and zeros, or a whole vector if there are more.
[[maybe_unused]] inline vfloat load_first(const float* p, int64_t count) {
    if (count >= kFloats) return load(p);
#if defined(METAREC_ISA_avx512)
    return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
    vfloat v = {};
    for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    return v;
#endif
}

alignas(64) constexpr int32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Lane i of the result is lane i ^ distance.
[[maybe_unused]] inline vfloat swap_lanes(vfloat v, int distance) {
    vint lane;
    std::memcpy(&lane, kLane, sizeof lane);
    return __builtin_shuffle(v, lane ^ distance);
}

// Half as many floats, exactly.
[[maybe_unused]] inline vdouble load_doubles(const float* p) {
    typedef float half __attribute__((vector_size(METAREC_VECTOR_BYTES / 2)));
    half v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vdouble);
}

[[maybe_unused]] inline float max_lane(vfloat v) {
#pragma GCC unroll 4
    for (int distance = kFloats / 2; distance > 0; distance /= 2) v = max(v, swap_lanes(v, distance));
    return v[0];
}

[[maybe_unused]] inline float min_lane(vfloat v) {
#pragma GCC unroll 4
    for (int distance = kFloats / 2; distance > 0; distance /= 2) v = min(v, swap_lanes(v, distance));
    return v[0];
}

[[maybe_unused]] inline float sum_lanes(vfloat v) {
#pragma GCC unroll 4
    for (int distance = kFloats / 2; distance > 0; distance /= 2) v += swap_lanes(v, distance);
    return v[0];
}

#if defined(METAREC_ISA_avx2) || defined(METAREC_ISA_avx512)
[[maybe_unused]] inline void sum_eights(const __m256* v, float* out) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}
#endif

// The sums of four vectors.
[[maybe_unused]] inline void sum_lanes(const vfloat* v, float* out) {
#if defined(METAREC_ISA_avx512)
    __m256 half[4];
    for (int j = 0; j < 4; ++j) {
        const __m512 both = (__m512)(v[j] + swap_lanes(v[j], 8));
        std::memcpy(&half[j], &both, sizeof half[j]);
    }
    sum_eights(half, out);
#elif defined(METAREC_ISA_avx2)
    const __m256 whole[4] = {(__m256)v[0], (__m256)v[1], (__m256)v[2], (__m256)v[3]};
    sum_eights(whole, out);
#else
    for (int j = 0; j < 4; ++j) out[j] = sum_lanes(v[j]);
#endif
}

[[maybe_unused]] inline uint32_t lane_bits(vint mask) {
#if defined(METAREC_ISA_avx512)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(METAREC_ISA_avx2)
    return _mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
    return _mm_movemask_ps((__m128)mask);
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kFloats; ++lane) bits |= (mask[lane] & 1u) << lane;
    return bits;
#endif
}

[[maybe_unused]] inline vint load(const int32_t* p) {
    vint v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
[[maybe_unused]] inline void store(int32_t* p, vint v) { std::memcpy(p, &v, sizeof v); }

// count + 1 in the lanes in which a > b.
[[maybe_unused]] inline vint count_greater(vint count, vint a, vint b) {
#if defined(METAREC_ISA_avx512)
    const __mmask16 greater = _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
    return (vint)_mm512_mask_add_epi32((__m512i)count, greater, (__m512i)count, _mm512_set1_epi32(1));
#else
    return count - (a > b);
#endif
}

// sum + a b, of pairs of 16-bit integers: twice the rate of float32. Without METAREC_PAIRS there is no such
// instruction.
#if defined(__SSE2__)
#define METAREC_PAIRS
[[maybe_unused]] inline vint add_pairs(vint sum, vint a, vint b) {
#if defined(__AVX512VNNI__)
    return (vint)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(METAREC_ISA_avx512)
    return sum + (vint)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(METAREC_ISA_avx2)
    return sum + (vint)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return sum + (vint)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}
#endif

// A bit for each lane in which a >= b, or a < b.
[[maybe_unused]] inline uint32_t lanes_at_least(vfloat a, vfloat b) {
#if defined(METAREC_ISA_avx512)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(METAREC_ISA_avx2)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#else
    return lane_bits(a >= b);
#endif
}
[[maybe_unused]] inline uint32_t lanes_below(vfloat a, vfloat b) {
#if defined(METAREC_ISA_avx512)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
#elif defined(METAREC_ISA_avx2)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ));
#else
    return lane_bits(a < b);
#endif
}

}  // namespace
}  // namespace metarec::METAREC_ISA
