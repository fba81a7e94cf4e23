// Loads and stores of 16 bytes, element types, and communication between blocks through global memory.
#pragma once
#include <float.h>

#include "kernel.cuh"

// Number of elements in 16 bytes.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

// x, rounded to element type T.
template <class T>
__device__ __forceinline__ float rounded(float x) { return to_float(from_float<T>(x)); }

template <class T>
__device__ __forceinline__ T* at(uint64_t address, int64_t element = 0) {
  return reinterpret_cast<T*>(address) + element;
}

// kVector<T> elements at an address aligned to 16 bytes.
template <class T>
struct Vector {
  float x[kVector<T>];

  static __device__ __forceinline__ Vector load(const T* p) { return unpack(*reinterpret_cast<const uint4*>(p)); }

  static __device__ __forceinline__ Vector unpack(uint4 bits) {
    T t[kVector<T>];
    memcpy(t, &bits, 16);
    Vector v;
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) v.x[j] = to_float(t[j]);
    return v;
  }

  __device__ __forceinline__ void store(T* p) const {
    T t[kVector<T>];
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) t[j] = from_float<T>(x[j]);
    uint4 bits;
    memcpy(&bits, t, 16);
    *reinterpret_cast<uint4*>(p) = bits;
  }
};

// Actual number of rows: *count clamped to max_rows, or max_rows without `count`.
__device__ __forceinline__ int num_rows(uint64_t count, int max_rows) {
  return count ? max(0, min(*at<const int32_t>(count), max_rows)) : max_rows;
}

// Loads a value that another block of this launch has stored. Bypasses the L1 cache, which is not coherent.
template <class T>
__device__ __forceinline__ T load_from_other_block(const T* p) {
#ifdef SOFTGPU
  return *p;
#else
  return __ldcg(p);
#endif
}

// Counts the blocks (or rows) that have called it. Returns true in all threads of the last of `total`, which then sees
// everything that the others stored before. Resets the counter to 0, so that a graph can be replayed.
// All threads of a block must call it together. The leading barrier makes one thread's fence cover the stores of all.
__device__ __forceinline__ bool is_last(uint32_t* counter, uint32_t total) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == total - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Copies a row, 16 bytes per thread at a time; four loads are in flight before the first store.
template <int kThreads>
__device__ __forceinline__ void copy_row(const uint4* from, uint4* to, int vectors) {
  constexpr int kUnroll = 4;
  for (int first = threadIdx.x; first < vectors; first += kThreads * kUnroll) {
    uint4 bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (first + u * kThreads < vectors) bits[u] = from[first + u * kThreads];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (first + u * kThreads < vectors) to[first + u * kThreads] = bits[u];
    }
  }
}
