// Vectors of one instruction set, by the compiler's vector extension: one body serves SSE2, AVX2, AVX-512 and NEON.
// Include only from files in KERNELS (CMakeLists.txt), which define METAREC_ISA. Such files use no std templates:
// their weak symbols would carry this instruction set into code that runs on every processor.
#pragma once

#include <cstdint>
#include <cstring>

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

[[maybe_unused]] inline vfloat load(const float* p) {
    vfloat v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
[[maybe_unused]] inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
[[maybe_unused]] inline vfloat broadcast(float x) { return x - vfloat{}; }

}  // namespace
}  // namespace metarec::METAREC_ISA
