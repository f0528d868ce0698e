// Multiply-adds in registers alone: what the processor could do if nothing else cost anything.
// Sixteen accumulators hide a latency of four cycles on two units; the loop has no memory operand.
typedef float vec __attribute__((vector_size(BENCH_BYTES)));

extern "C" float fma_peak(long steps) {
    constexpr int kSums = 16;
    vec sum[kSums], factor, term;
    for (int i = 0; i < static_cast<int>(sizeof(vec) / 4); ++i) {
        factor[i] = 0.999f;
        term[i] = 1e-3f;
        for (int j = 0; j < kSums; ++j) sum[j][i] = static_cast<float>(i + j);
    }
    for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 16
        for (int j = 0; j < kSums; ++j) {
            sum[j] = sum[j] * factor + term;
            asm volatile("" : "+v"(sum[j]));
        }
    }
    float total = 0;
    for (int j = 0; j < kSums; ++j)
        for (int i = 0; i < static_cast<int>(sizeof(vec) / 4); ++i) total += sum[j][i];
    return total;
}

extern "C" long multiply_adds_per_step() { return 16 * static_cast<long>(sizeof(vec) / 4); }
