// merge_state: combines two attentions over disjoint keys into the attention over both. Launch: src/ops/merge_state.rs.
//
// grid   (max_rows * num_heads / heads per block, rounded up)
// block  256 threads. A group of lanes owns one row and head: as many lanes as a head has vectors of 16 bytes, rounded up to a
//        power of two, at most 32. At head_dim 128 in bf16 a warp owns two, a block 16. Wider heads take several rounds.
// shared none
// bytes  3 * head_dim * sizeof(element) + 12 per row and head
// bound  memory bandwidth; at 32 rows the latency of two dependent loads and one store
//
// In place: the lane that read a vector writes it, and log-sum-exps are written after the warp has read them. Both sides are
// loaded before it is known which of them counts, so that no load waits for another; a side that does not count is not used.
#include "memory.cuh"
#include "reduce.cuh"

namespace {

constexpr int kThreads = 256;

// Weights of both sides and the combined log-sum-exp; the same bits with the sides exchanged.
struct Weights {
  float a, b, lse;

  __device__ __forceinline__ Weights(float a_lse, float b_lse) {
    const float top = fmaxf(a_lse, b_lse), smaller = expf(-fabsf(a_lse - b_lse));
    const float larger_weight = 1.f / (1.f + smaller), smaller_weight = smaller / (1.f + smaller);
    a = a_lse >= b_lse ? larger_weight : smaller_weight;
    b = a_lse >= b_lse ? smaller_weight : larger_weight;
    lse = top + log1pf(smaller);
  }
};

template <class T>
__device__ __forceinline__ void merge_state(const dllm_merge_state_params& p) {
  const int vectors = p.head_dim / kVector<T>;
  int lanes = 1;
  while (lanes < vectors && lanes < kWarp) lanes *= 2;
  const int64_t row_head = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int lane = threadIdx.x % lanes;
  const int64_t row = row_head / p.num_heads;
  const int column = int(row_head - row * p.num_heads) * p.head_dim;
  const bool inside = row < num_rows(p.count, p.max_rows);

  float a_lse = -INFINITY, b_lse = -INFINITY;
  if (inside) {
    a_lse = at<const float>(p.a_lse)[row_head];
    b_lse = at<const float>(p.b_lse)[row_head];
    const T* a = at<const T>(p.a_out, row * p.a_stride + column);
    const T* b = at<const T>(p.b_out, row * p.b_stride + column);
    T* out = at<T>(p.out, row * p.out_stride + column);
    const Weights weights(a_lse, b_lse);
    for (int v = lane; v < vectors; v += lanes) {
      Vector<T> x = Vector<T>::load(a + v * kVector<T>);
      const Vector<T> y = Vector<T>::load(b + v * kVector<T>);
#pragma unroll
      for (int j = 0; j < kVector<T>; j++) {
        // Each product is rounded. Contracted to an FMA, the sum would depend on the order of the sides.
        const float both = __fadd_rn(__fmul_rn(weights.a, x.x[j]), __fmul_rn(weights.b, y.x[j]));
        const float b_or_none = b_lse == -INFINITY ? 0.f : y.x[j];
        x.x[j] = a_lse == -INFINITY ? b_or_none : b_lse == -INFINITY ? x.x[j] : both;
      }
      x.store(out + v * kVector<T>);
    }
  }
  __syncwarp();  // all lanes of this row and head have read its log-sum-exps, one of which may be overwritten
  if (inside && lane == 0) {
    const bool one_side = a_lse == -INFINITY || b_lse == -INFINITY;
    at<float>(p.lse)[row_head] = !one_side ? Weights(a_lse, b_lse).lse : a_lse == -INFINITY ? b_lse : a_lse;
  }
}

}  // namespace

#define MERGE_STATE(name, T)                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) name(DLLM_PARAMS dllm_merge_state_params p) { merge_state<T>(p); }  \
  SOFTGPU_KERNEL(name)

MERGE_STATE(merge_state_bf16, __nv_bfloat16)
MERGE_STATE(merge_state_f16, __half)
MERGE_STATE(merge_state_f32, float)
