// swiglu: gate of the feed-forward layer, with the roundings of the reference models. Launch: src/ops/swiglu.rs.
//
// grid   (max_rows, tiles). A block owns one tile: 1,024 vectors of 16 bytes of an output row. Rows are the first dimension,
//        because only that one holds more than 65,535 blocks.
// block  256 threads of four vectors each; all loads are in flight before the first result is used
// shared none
// bytes  3 * width * sizeof(element) per row
// bound  memory bandwidth
#include "memory.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;

template <class T>
__device__ __forceinline__ void swiglu(const dllm_swiglu_params& p) {
  const int64_t row = blockIdx.x;
  if (row >= num_rows(p.count, p.max_rows)) return;
  const T* gate = at<const T>(p.gate_up, row * p.gate_up_stride);
  const T* up = gate + p.width;
  T* out = at<T>(p.out, row * p.out_stride);
  const auto element = [](int v) { return ((int(blockIdx.y) * kVectors + v) * kThreads + int(threadIdx.x)) * kVector<T>; };

  uint4 gates[kVectors], ups[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    if (element(v) < p.width) {
      gates[v] = *reinterpret_cast<const uint4*>(gate + element(v));
      ups[v] = *reinterpret_cast<const uint4*>(up + element(v));
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    if (element(v) >= p.width) break;
    Vector<T> result = Vector<T>::unpack(gates[v]);
    const Vector<T> factor = Vector<T>::unpack(ups[v]);
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) {
      result.x[j] = rounded<T>(result.x[j] / (1.f + expf(-result.x[j]))) * factor.x[j];
    }
    result.store(out + element(v));
  }
}

}  // namespace

#define SWIGLU(name, T)                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) name(DLLM_PARAMS dllm_swiglu_params p) { swiglu<T>(p); } \
  SOFTGPU_KERNEL(name)

SWIGLU(swiglu_bf16, __nv_bfloat16)
SWIGLU(swiglu_f16, __half)
SWIGLU(swiglu_f32, float)
