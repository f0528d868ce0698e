// A 64-bit hash of 32-bit words, in independent chains to hide the latency of each.
#pragma once

#include <cstdint>
#include <cstring>

namespace metarec {

struct Hash {
    static constexpr int kChains = 4;
    uint64_t chain[kChains] = {1, 2, 3, 4};

    void add(int64_t j, float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        chain[j] = (chain[j] ^ bits) * 0x9E3779B97F4A7C15u;
        chain[j] ^= chain[j] >> 29;
    }
    uint64_t value() const {
        return ((chain[0] * 3 + chain[1]) * 0xBF58476D1CE4E5B9u) ^ ((chain[2] * 5 + chain[3]) * 0x94D049BB133111EBu);
    }
};

}  // namespace metarec
