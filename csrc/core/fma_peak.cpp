#include "core/fma_peak.h"

#include "core/vec.h"

namespace metarec::METAREC_ISA {

// Enough sums to hide a latency of four cycles on two units, in the registers that there are.
constexpr int kSums = METAREC_VECTOR_BYTES == 64 ? 16 : 12;

int64_t fma_peak(int64_t steps) {
    const vfloat factor = broadcast(0.999f), term = broadcast(1e-3f);
    vfloat sum[kSums];
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) sum[j] = broadcast(static_cast<float>(j));
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
        for (int j = 0; j < kSums; ++j) {
            sum[j] = sum[j] * factor + term;
            asm volatile("" : "+v"(sum[j]));
        }
    }
    return 2 * steps * kSums * kFloats;
}

}  // namespace metarec::METAREC_ISA
