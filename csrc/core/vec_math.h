// Elementary functions on the vectors of core/vec.h.
#pragma once

#include "core/vec.h"

namespace metarec::METAREC_ISA {
namespace {

// exp(x) for x <= 88, within 2 ulp; 0 below -87.3, where the result would be subnormal. NaN stays NaN.
[[maybe_unused]] inline vfloat exp(vfloat x) {
    // x = n ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 leaves n in the lowest bits of the sum, and 127 more makes
    // it the exponent of 2^n.
    const float round = 12582912.0f + 127.0f;
    const vfloat shifted = x * 1.44269504f + round;
    const vfloat n = shifted - round;
    const vfloat r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vfloat y = r * 1.381408074e-3f + 8.368779905e-3f;
    y = y * r + 4.166841134e-2f;
    y = y * r + 1.666651964e-1f;
    y = y * r + 4.999999404e-1f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    const vfloat power = (vfloat)((vint)shifted << 23);
    return x < -87.3f ? vfloat{} : y * power;
}

}  // namespace
}  // namespace metarec::METAREC_ISA
