#include "sampler/epoch_order.h"

#include "core/vec.h"

namespace metarec::METAREC_ISA {
namespace {

typedef uint32_t vuint __attribute__((vector_size(METAREC_VECTOR_BYTES)));

constexpr int kRounds = 8;
constexpr int kMinBits = 8;    // halves of one or two bits do not mix
constexpr int kEntries = 256;  // walked together

inline vuint mix(vuint x, uint32_t key) {
    x = (x + key) * 0x9E3779B1u;
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    return x ^ x >> 16;
}

struct Network {
    int low_bits;
    uint32_t low_mask, high_mask, keys[kRounds];
};

inline void permute(const Network& net, uint32_t* high, uint32_t* low, int count) {
    for (int i = 0; i < count; i += kFloats) {
        vuint h, l;
        std::memcpy(&h, high + i, sizeof h);
        std::memcpy(&l, low + i, sizeof l);
        for (int r = 0; r < kRounds; r += 2) {
            h ^= mix(l, net.keys[r]) & net.high_mask;
            l ^= mix(h, net.keys[r + 1]) & net.low_mask;
        }
        std::memcpy(high + i, &h, sizeof h);
        std::memcpy(low + i, &l, sizeof l);
    }
}

}  // namespace

void epoch_order(const Randomness& random, int64_t size, int64_t first, int64_t count, int64_t* out) {
    Network net;
    int bits = kMinBits;
    while (uint64_t(size - 1) >> bits) ++bits;
    net.low_bits = bits / 2;
    net.low_mask = uint32_t((uint64_t(1) << net.low_bits) - 1);
    net.high_mask = uint32_t((uint64_t(1) << (bits - net.low_bits)) - 1);
    for (int i = 0; i < kRounds; ++i) net.keys[i] = block_of(random, uint32_t(i / 4), 0, 0).word[i % 4];

#pragma omp parallel for if (count > 65536)
    for (int64_t begin = 0; begin < count; begin += kEntries) {
        alignas(64) uint32_t high[kEntries], low[kEntries];
        int32_t entry[kEntries];
        int walking = int(count - begin < kEntries ? count - begin : kEntries);
        for (int i = 0; i < walking; ++i) {
            const uint64_t x = uint64_t(first + begin + i);
            high[i] = uint32_t(x >> net.low_bits);
            low[i] = uint32_t(x) & net.low_mask;
            entry[i] = i;
        }
        while (walking > 0) {  // what falls outside goes through again, without a branch for each
            permute(net, high, low, walking);
            int outside = 0;
            for (int i = 0; i < walking; ++i) {
                const uint64_t x = uint64_t(high[i]) << net.low_bits | low[i];
                out[begin + entry[i]] = int64_t(x);
                high[outside] = high[i];
                low[outside] = low[i];
                entry[outside] = entry[i];
                outside += x >= uint64_t(size);
            }
            walking = outside;
        }
    }
}

}  // namespace metarec::METAREC_ISA
