// IEEE half precision on the host, in integer arithmetic: the same result on every host and compiler.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "vector_types.h"

namespace softgpu {

inline float half_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16;
    const uint32_t exponent = (bits >> 10) & 0x1f;
    const uint32_t mantissa = bits & 0x3ff;
    uint32_t wide;
    if (exponent == 0x1f) {
        wide = sign | 0x7f800000 | mantissa << 13;  // infinity, NaN
    } else if (exponent != 0) {
        wide = sign | (exponent + (127 - 15)) << 23 | mantissa << 13;
    } else {
        const float magnitude = float(mantissa) * 0x1p-24f;  // zero and subnormal: a multiple of 2^-24, exact in float
        memcpy(&wide, &magnitude, sizeof wide);
        wide |= sign;
    }
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// Rounds to nearest, ties to even. Every NaN becomes the one that CUDA returns.
inline uint16_t float_to_half(float value) {
    if (value != value) return 0x7fff;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // from 65520 on: infinity
    if (magnitude >= 0x38800000) {                      // from 2^-14 on: a normal half
        const uint32_t rebased = magnitude - ((127 - 15) << 23);
        const uint32_t is_odd = (rebased >> 13) & 1;
        return uint16_t(sign | (rebased + 0xfff + is_odd) >> 13);
    }
    // Subnormal: count multiples of 2^-24. The product is exact and nearbyintf rounds ties to even.
    float positive;
    memcpy(&positive, &magnitude, sizeof positive);
    return uint16_t(sign | uint16_t(nearbyintf(positive * 0x1p24f)));
}

}  // namespace softgpu

struct __half {
    uint16_t bits;
    __half() = default;
    __half(float value) : bits(softgpu::float_to_half(value)) {}
    operator float() const { return softgpu::half_to_float(bits); }
};
typedef __half half;

struct alignas(4) __half2 {
    __half x, y;
    __half2() = default;
    __half2(__half x, __half y) : x(x), y(y) {}
};
typedef __half2 half2;

inline __half __ushort_as_half(unsigned short bits) {
    __half h;
    h.bits = bits;
    return h;
}
inline unsigned short __half_as_ushort(__half h) { return h.bits; }

inline float __half2float(__half h) { return softgpu::half_to_float(h.bits); }
inline __half __float2half_rn(float f) { return __ushort_as_half(softgpu::float_to_half(f)); }
inline __half __float2half(float f) { return __float2half_rn(f); }

inline float __low2float(__half2 h) { return __half2float(h.x); }
inline float __high2float(__half2 h) { return __half2float(h.y); }
inline float2 __half22float2(__half2 h) { return {__low2float(h), __high2float(h)}; }
inline __half2 __floats2half2_rn(float x, float y) { return __half2(__float2half_rn(x), __float2half_rn(y)); }
inline __half2 __float22half2_rn(float2 f) { return __floats2half2_rn(f.x, f.y); }
inline __half2 __halves2half2(__half x, __half y) { return __half2(x, y); }
