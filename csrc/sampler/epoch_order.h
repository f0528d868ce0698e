// The order of an epoch: a keyed permutation, entry by entry. The definition is metarec_fast/reference/permutation.py.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "sampler/philox.h"

// out[i] = entry first + i of a keyed permutation of [0, size): Feistel network with cycle walking, no array.
METAREC_KERNEL(void epoch_order(const Randomness& random, int64_t size, int64_t first, int64_t count, int64_t* out))
