#pragma once

#include <cstdint>

#include "core/isa.h"

// `steps` rounds of multiply-adds on registers alone: what the processor could do if nothing else cost anything.
// Returns the number of floating-point operations, two a multiply-add.
METAREC_KERNEL(int64_t fma_peak(int64_t steps))
