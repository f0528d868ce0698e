// Philox4x32-10 and what its key and counter hold. The definition is metarec_fast/reference/philox.py.
// Functions have internal linkage: files for different instruction sets include this.
#pragma once

#include <cstdint>

namespace metarec {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxBlock {
    uint32_t word[4];
};

enum class Purpose : uint32_t { permutation = 1, crop = 2, negative = 3, shared = 4 };

constexpr int kMaxAttempts = 4096;  // the counter has 12 bits for them

// The words of one seed, stream, step and purpose: counter = (block, row, c2, c3 | attempt).
struct Randomness {
    uint32_t key0, key1, c2, c3;
};

namespace {

[[maybe_unused]] inline PhiloxBlock philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                           uint32_t k1) {
    for (int i = 0; i < kPhiloxRounds; ++i) {
        const uint64_t a = uint64_t(c0) * kPhiloxMultiplier0, b = uint64_t(c2) * kPhiloxMultiplier1;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0;
        c1 = uint32_t(b);
        c2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c3 = uint32_t(a);
        k0 += kPhiloxWeyl0;
        k1 += kPhiloxWeyl1;
    }
    return {{c0, c1, c2, c3}};
}

// step < 2**48
[[maybe_unused]] inline Randomness make_randomness(uint64_t seed, uint64_t stream, uint64_t step, Purpose purpose) {
    const PhiloxBlock key =
        philox(uint32_t(stream), uint32_t(stream >> 32), 0, 0, uint32_t(seed), uint32_t(seed >> 32));
    return {key.word[0], key.word[1], uint32_t(step), uint32_t(step >> 32) << 16 | uint32_t(purpose) << 12};
}

[[maybe_unused]] inline PhiloxBlock block_of(const Randomness& random, uint32_t block, uint32_t row, int attempt) {
    return philox(block, row, random.c2, random.c3 | uint32_t(attempt), random.key0, random.key1);
}

// 64 bits: two slots share a block.
[[maybe_unused]] inline uint64_t wide_word(const Randomness& random, int64_t slot, uint32_t row, int attempt) {
    const PhiloxBlock block = block_of(random, uint32_t(slot / 2), row, attempt);
    return uint64_t(block.word[2 * (slot % 2) + 1]) << 32 | block.word[2 * (slot % 2)];
}

// Uniform in [0, n) by Lemire's multiply-shift; the 2**64 mod n words that would bias it are refused.
[[maybe_unused]] inline uint64_t bounded_wide(const Randomness& random, uint64_t n, int64_t slot, uint32_t row,
                                              int attempt) {
    for (;; ++attempt) {
        const unsigned __int128 product = static_cast<unsigned __int128>(wide_word(random, slot, row, attempt)) * n;
        const uint64_t low = uint64_t(product);
        // at most one word in two is refused: the last attempt is out of reach
        if (low >= n || low >= (0 - n) % n || attempt + 1 >= kMaxAttempts) return uint64_t(product >> 64);
    }
}

}  // namespace
}  // namespace metarec
