// rope: rotary embedding of queries and keys in place; stores keys and values in the cache. Launch: src/ops/rope.rs.
//
// grid   (max_rows, parts). A block owns 256 items of a row [q | k | v], one per thread. An item is 16 bytes of the lower half
//        of a query or key head together with their 16 bytes of the upper half, or 16 bytes of a value to cache.
// block  256 threads; each issues all its loads before its first store
// shared none
// bytes  2 * (num_heads + num_kv_heads) * head_dim * sizeof(element) per row; with a k_cache num_kv_heads *
//        head_dim * sizeof(element) more, with a v_cache twice that more; angles come from the L2 cache
// bound  memory bandwidth; at 32 rows the latency of two dependent loads (position, angle)
#include "memory.cuh"

namespace {

constexpr int kThreads = 256;

template <class T>
__device__ __forceinline__ void rope(const dllm_rope_params& p) {
  constexpr int kVec = kVector<T>;
  const int64_t row = blockIdx.x;
  if (row >= num_rows(p.count, p.max_rows)) return;
  const int position = at<const int32_t>(p.positions)[row];
  const int cache_row = p.k_cache ? at<const int32_t>(p.cache_row)[row] : -1;
  if (position < 0 || position >= p.num_positions || cache_row < -1 || cache_row >= p.num_cache_rows) {
    if (p.failed && threadIdx.x == 0) *at<int32_t>(p.failed) = DLLM_INDEX_FAILED;
    return;
  }
  const int half = p.head_dim / 2;
  const float2* angles = at<const float2>(p.angles, int64_t(position) * half);
  T* qkv = at<T>(p.qkv, row * p.qkv_stride);
  T* cached_keys = at<T>(p.k_cache, cache_row * p.cache_stride);
  T* cached_values = at<T>(p.v_cache, cache_row * p.cache_stride);

  const int pairs_per_head = half / kVec;
  const int pairs = (p.num_heads + p.num_kv_heads) * pairs_per_head;
  const int item = blockIdx.y * kThreads + threadIdx.x;
  if (item < pairs) {
    const int head = item / pairs_per_head, first = item % pairs_per_head * kVec;
    T* at_low = qkv + head * p.head_dim + first;
    Vector<T> low = Vector<T>::load(at_low), high = Vector<T>::load(at_low + half);
    float4 angle[kVec / 2];  // cosine, sine of two elements
#pragma unroll
    for (int j = 0; j < kVec / 2; j++) angle[j] = reinterpret_cast<const float4*>(angles + first)[j];
#pragma unroll
    for (int j = 0; j < kVec; j++) {
      const float cosine = j % 2 ? angle[j / 2].z : angle[j / 2].x, sine = j % 2 ? angle[j / 2].w : angle[j / 2].y;
      const float a = low.x[j], b = high.x[j];
      low.x[j] = __fsub_rn(__fmul_rn(a, cosine), __fmul_rn(b, sine));
      high.x[j] = __fadd_rn(__fmul_rn(b, cosine), __fmul_rn(a, sine));
    }
    low.store(at_low);
    high.store(at_low + half);
    if (cache_row >= 0 && head >= p.num_heads) {
      T* key = cached_keys + (head - p.num_heads) * p.head_dim + first;
      low.store(key);
      high.store(key + half);
    }
  } else if (p.v_cache && cache_row >= 0 && item - pairs < p.num_kv_heads * p.head_dim / kVec) {
    const T* values = qkv + (p.num_heads + p.num_kv_heads) * p.head_dim;
    reinterpret_cast<uint4*>(cached_values)[item - pairs] = reinterpret_cast<const uint4*>(values)[item - pairs];
  }
}

}  // namespace

#define ROPE(name, T)                                                                                         \
  extern "C" __global__ void __launch_bounds__(kThreads) name(DLLM_PARAMS dllm_rope_params p) { rope<T>(p); } \
  SOFTGPU_KERNEL(name)

ROPE(rope_bf16, __nv_bfloat16)
ROPE(rope_f16, __half)
