// Philox 4x32-10 (Salmon et al., SC 2011). A random number is a function of (seed, purpose, step, position, token) only,
// the same on the CPU (src/sampling/philox.rs).
#pragma once
#include "kernel.cuh"

// Use of a random number; a part of the counter.
enum Purpose : uint32_t { kToken = 0, kConfidence = 1, kRank = 2 };

// 53 random bits, the lowest one set: 2^53 times the middle of one of 2^52 equal parts of (0, 1).
__device__ __forceinline__ uint64_t philox(uint64_t seed, Purpose purpose, uint32_t step, uint32_t position, uint32_t token) {
  uint32_t c0 = token, c1 = position, c2 = step, c3 = purpose;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t a_low = 0xD2511F53u * c0, a_high = __umulhi(0xD2511F53u, c0);
    const uint32_t b_low = 0xCD9E8D57u * c2, b_high = __umulhi(0xCD9E8D57u, c2);
    c0 = b_high ^ c1 ^ k0;
    c1 = b_low;
    c2 = a_high ^ c3 ^ k1;
    c3 = a_low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (uint64_t(c0) << 20 | c1 >> 12) << 1 | 1;
}

constexpr float kTwoToMinus53 = 1.1102230246251565e-16f;

// Uniform in (0, 1], correct to a relative 2^-24.
__device__ __forceinline__ float uniform(uint64_t bits) { return float(bits) * kTwoToMinus53; }

// Standard Gumbel noise, -ln(-ln u). Near u = 1 the inner logarithm is computed from 1 - u, which is exact. So large noise,
// which decides most draws, is as accurate as small noise.
__device__ __forceinline__ float gumbel(uint64_t bits) {
  const bool high = bits >> 52;
  const uint64_t rest = (uint64_t(1) << 53) - bits;
  const float exponential = high ? -log1pf(-(float(rest) * kTwoToMinus53)) : -logf(uniform(bits));
  return -logf(exponential);
}
