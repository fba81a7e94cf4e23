// Reductions over a block, in an order that depends on the block size only, and an order-preserving map of floats to integers.
#pragma once
#include "kernel.cuh"

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Maps a float to an unsigned integer that preserves the order; minus infinity is lowest. x must not be NaN. Results exceed 0.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// Key of (value, index): larger values rank higher, then lower indices.
__device__ __forceinline__ uint64_t ranked(float value, int index) {
  return uint64_t(ordered(value)) << 32 | (0xffffffffu - uint32_t(index));
}
__device__ __forceinline__ float rank_value(uint64_t key) { return from_ordered(uint32_t(key >> 32)); }
__device__ __forceinline__ int rank_index(uint64_t key) { return int(0xffffffffu - uint32_t(key)); }

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// A sum and a lowest index in one 64-bit word, so that one reduction computes both.
__device__ __forceinline__ uint64_t sum_and_index(float sum, int index) {
  return uint64_t(__float_as_uint(sum)) << 32 | uint32_t(index);
}
__device__ __forceinline__ float sum_of(uint64_t both) { return __uint_as_float(uint32_t(both >> 32)); }
__device__ __forceinline__ int index_of(uint64_t both) { return int(uint32_t(both)); }
struct SumAndLowest {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const {
    return sum_and_index(sum_of(a) + sum_of(b), min(index_of(a), index_of(b)));
  }
};

template <class T, class F>
__device__ __forceinline__ T warp_reduce(T x, F f) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// Returns the result in every thread. All threads of the block must call it together. `zero` is the identity of f.
template <int kThreads, class T, class F>
__device__ __forceinline__ T block_reduce(T x, T zero, F f) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp, "one warp reduces the warps' results");
  __shared__ T results[kWarps];
  x = warp_reduce(x, f);
  __syncthreads();  // the results of the previous call have been read
  if (threadIdx.x % kWarp == 0) results[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  return warp_reduce(lane < kWarps ? results[lane] : zero, f);
}
