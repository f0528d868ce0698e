// Multiply-adds in registers alone: what the processor could do if nothing else cost anything.
// Sixteen accumulators hide a latency of four cycles on two units; the loop has no memory operand.
#include <cstring>

typedef float vec __attribute__((vector_size(BENCH_BYTES)));
constexpr int kSums = BENCH_BYTES == 64 ? 16 : 12;  // with the two constants, what fits 32 or 16 registers

extern "C" float fma_peak(long steps) {
    const vec factor = vec{} + 0.999f, term = vec{} + 1e-3f;
    vec sum[kSums];
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) sum[j] = vec{} + static_cast<float>(j);
    for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 16
        for (int j = 0; j < kSums; ++j) {
            sum[j] = sum[j] * factor + term;
            asm volatile("" : "+v"(sum[j]));
        }
    }
    // read, so that no compiler may drop the work; an index into `sum` or a lane would put the sums in memory
    vec total = {};
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) total += sum[j];
    float first;
    std::memcpy(&first, &total, sizeof first);
    return first;
}

extern "C" long multiply_adds_per_step() { return kSums * static_cast<long>(BENCH_BYTES / 4); }
