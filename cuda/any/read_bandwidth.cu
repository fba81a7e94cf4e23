// read_bandwidth: reads memory and discards it: the upper bound for kernels that are bound by reading. Launch:
// src/ops/read_bandwidth.rs. Not an op of the model: other kernels are measured against it.
//
// grid   (tiles of 64 KiB). A block reads one tile.
// block  512 threads of eight loads of 16 bytes, most of them in flight before the first result is used; few enough registers
//        for 2,048 threads per multiprocessor
// shared none
// bytes  p.bytes
// bound  memory bandwidth
#include "memory.cuh"

namespace {
constexpr int kThreads = 512;
constexpr int kLoads = 8;
}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) read_bandwidth(DLLM_PARAMS dllm_read_bandwidth_params p) {
  const uint4* source = at<const uint4>(p.source);
  const int64_t vectors = p.bytes / 16;
  const int64_t first = int64_t(blockIdx.x) * (kThreads * kLoads) + threadIdx.x;
  uint4 bits[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; i++) {
    const int64_t vector = first + i * kThreads;
    bits[i] = vector < vectors ? source[vector] : make_uint4(0, 0, 0, 0);
  }
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < kLoads; i++) any ^= bits[i].x ^ bits[i].y ^ bits[i].z ^ bits[i].w;
  // Rarely true, but it keeps the compiler from removing the loads.
  if (any == 0x9E3779B9u) *at<uint32_t>(p.sink) = any;
}
SOFTGPU_KERNEL(read_bandwidth)
