// norm: residual add and RMSNorm, with the roundings of the reference models. Launch: src/ops/norm.rs.
//
// grid   (max_rows). A block owns one row, so that its bits do not depend on the number of rows.
// block  256 threads of at most 32 elements each, in registers from the first load to the last store
// shared 32 bytes for the reduction
// bytes  (2 + 2 where a delta is added) * width * sizeof(element) per row, and the weights once
// bound  memory bandwidth; at 32 rows the latency of one load (two with delta_row), one reduction and one store
#include "memory.cuh"
#include "reduce.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 32;

template <class T>
__device__ __forceinline__ void norm(const dllm_norm_params& p) {
  constexpr int kVectors = kPerThread / kVector<T>;
  const int64_t row = blockIdx.x;
  if (row >= num_rows(p.count, p.max_rows)) return;
  T* x = at<T>(p.x, row * p.x_stride);
  T* out = at<T>(p.out, row * p.out_stride);
  const auto element = [](int v) { return (v * kThreads + int(threadIdx.x)) * kVector<T>; };

  const int delta_row = p.delta_row ? at<const int32_t>(p.delta_row)[row] : int(row);

  // All loads come before the first store, because the compiler moves no load past a store that may alias it. The loads of the
  // delta are behind a branch, so that only they wait for delta_row.
  uint4 bits[kVectors], added[kVectors], weights[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    if (element(v) < p.width) {
      bits[v] = *reinterpret_cast<const uint4*>(x + element(v));
      weights[v] = *reinterpret_cast<const uint4*>(at<const T>(p.weight) + element(v));
    }
  }
  const int num_delta_rows = p.delta_row ? p.num_delta_rows : p.max_rows;
  const bool adds = (p.delta != 0) & (uint32_t(delta_row) < uint32_t(num_delta_rows));
  if (adds) {
    const T* delta = at<const T>(p.delta, delta_row * p.delta_stride);
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
      if (element(v) < p.width) added[v] = *reinterpret_cast<const uint4*>(delta + element(v));
    }
  }
  Vector<T> values[kVectors];
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    if (element(v) >= p.width) break;
    values[v] = Vector<T>::unpack(bits[v]);
    if (adds) {
      const Vector<T> delta_values = Vector<T>::unpack(added[v]);
#pragma unroll
      for (int j = 0; j < kVector<T>; j++) values[v].x[j] = rounded<T>(values[v].x[j] + delta_values.x[j]);
      values[v].store(x + element(v));
    }
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) sum += values[v].x[j] * values[v].x[j];
  }
  const float mean = block_reduce<kThreads>(sum, 0.f, Sum()) / float(p.width);
  const float scale = 1.f / sqrtf(mean + p.eps);
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    if (element(v) >= p.width) break;
    const Vector<T> weight = Vector<T>::unpack(weights[v]);
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) values[v].x[j] = rounded<T>(values[v].x[j] * scale) * weight.x[j];
    values[v].store(out + element(v));
  }
}

}  // namespace

#define NORM(name, T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads) name(DLLM_PARAMS dllm_norm_params p) { norm<T>(p); }      \
  SOFTGPU_KERNEL(name)

NORM(norm_bf16, __nv_bfloat16)
NORM(norm_f16, __half)
NORM(norm_f32, float)
