// top_k_top_p: smallest logit that top-p, then top-k, keep; unmask ignores logits below it. Launch: src/ops/top_k_top_p.rs.
//
// grid    (max_rows). A block owns one row; blocks of rows that are not masked return.
// block   1,024 threads
// passes  over the row, all but the first from the L2 cache: one for the maximum, then five for each of top-p and top-k. The
//         first of the five is a histogram of the distance from the maximum, in 255 steps; the other four refine the step that
//         holds the threshold, 8 bits at a time. Distances spread evenly over the steps. Leading bits of floats do not, and a
//         histogram with most elements in one bucket is slow.
// shared  2 KiB histogram, and a few hundred bytes for reductions
// bytes   vocab_size * sizeof(element) per row
// bound   latency of a block's passes
//
// Probabilities are summed as integers (e^x times 2^40), so that the order of atomics does not change a sum.
#include "logits.cuh"
#include "reduce.cuh"
#include "select.cuh"

namespace {

constexpr int kThreads = 1024;
constexpr float kReach = 64.f;  // in temperatures below the maximum; weights further below add nothing to a sum in f32
constexpr float kUnit = 1099511627776.f;  // 2^40
constexpr int kSteps = kBuckets - 1;  // steps of the distance, up to kReach. Step 0 is the highest bucket; bucket 0 is beyond

// A row of logits, with guidance and without the mask token.
template <class T>
struct Row {
  const dllm_top_k_top_p_params& p;
  int64_t row;
  bool without_mask;  // the mask token has the largest logit and counts as minus infinity
  float max = -INFINITY;

  // Calls f(token, logit) for each token of this thread; two vectors are in flight at a time.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    constexpr int kVec = kVector<T>, kBatch = 2, kStep = kThreads * kVec;
    const int64_t offset = row * p.logits_stride;
    for (int first = int(threadIdx.x) * kVec; first < p.vocab_size; first += kBatch * kStep) {
      uint4 bits[kBatch], unconditional[kBatch];
      load_vectors(at<const T>(p.logits, offset), first, kStep, p.vocab_size, bits);
      if (p.uncond_logits) load_vectors(at<const T>(p.uncond_logits, offset), first, kStep, p.vocab_size, unconditional);
#pragma unroll
      for (int v = 0; v < kBatch; v++) {
        const Vector<T> vector = Vector<T>::unpack(bits[v]);
        const Vector<T> other = Vector<T>::unpack(unconditional[v]);
#pragma unroll
        for (int j = 0; j < kVec; j++) {
          const int token = first + v * kStep + j;
          if (token >= p.vocab_size) break;
          const float logit = sanitized(p.uncond_logits ? guided(vector.x[j], other.x[j], p.cfg_scale) : vector.x[j]);
          f(token, without_mask && token == p.mask_token ? -INFINITY : logit);
        }
      }
    }
  }
};

// Weight of a token: 1 for top-k, its probability for top-p.
struct ByCount {
  __device__ __forceinline__ unsigned long long operator()(float) const { return 1; }
};
struct ByProbability {
  float max, scale;
  __device__ __forceinline__ unsigned long long operator()(float logit) const {
    return (unsigned long long)(exp_approx((logit - max) * scale) * kUnit);
  }
};

__device__ __forceinline__ int bucket_of(float logit, float max, float steps) {
  // The largest logits go to the highest bucket, where find_bucket starts.
  return kSteps - int(fminf((max - logit) * steps, float(kSteps)));
}

// Returns the logit at which the cumulative weight, from the largest logit down, reaches `share`. `total` is the sum of all
// weights; what exceeds the sum over the steps counts as the weight of logits beyond kReach.
template <class T, class W>
__device__ __forceinline__ float logit_at_share(const Row<T>& row, W weight, float steps, unsigned long long total,
                                                unsigned long long share) {
  __shared__ unsigned long long histogram[kBuckets];
  const auto clear = [&] {
    __syncthreads();
    if (threadIdx.x < kBuckets) histogram[threadIdx.x] = 0;
    __syncthreads();
  };
  const auto content = [&] { return threadIdx.x < kBuckets ? histogram[threadIdx.x] : 0ull; };

  clear();
  row.each([&](int, float logit) {
    const int bucket = bucket_of(logit, row.max, steps);
    if (bucket > 0) atomicAdd(&histogram[bucket], weight(logit));
  });
  __syncthreads();
  unsigned long long sum = block_reduce<kThreads>(content(), 0ull, Sum());
  if (threadIdx.x == 0) histogram[0] = total > sum ? total - sum : 0;
  __syncthreads();
  if (share > max(total, sum)) share = max(total, sum);
  const Bucket<unsigned long long> step = find_bucket(content(), share);
  share -= step.above;

  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    clear();
    row.each([&](int, float logit) {
      const uint32_t key = ordered(logit);
      const bool inside = bucket_of(logit, row.max, steps) == step.digit && (shift == 24 || key >> (shift + 8) == prefix);
      if (inside) atomicAdd(&histogram[key >> shift & 255], weight(logit));
    });
    __syncthreads();
    sum = block_reduce<kThreads>(content(), 0ull, Sum());
    if (sum == 0) return -INFINITY;  // all logits of the step are beyond kReach and have no weight
    const Bucket<unsigned long long> digit = find_bucket(content(), share < sum ? share : sum);
    share -= digit.above;
    prefix = prefix << 8 | uint32_t(digit.digit);
  }
  return from_ordered(prefix);
}

template <class T>
__device__ __forceinline__ float find_min_logit(const dllm_top_k_top_p_params& p, const dllm_unmask_row& table_row) {
  Row<T> row{p, table_row.logits_row, false};
  uint64_t top = 0, top_without_mask = 0;
  row.each([&](int token, float logit) {
    const uint64_t key = ranked(logit, token);
    top = Max()(top, key);
    if (token != p.mask_token) top_without_mask = Max()(top_without_mask, key);
  });
  top = block_reduce<kThreads>(top, uint64_t(0), Max());
  top_without_mask = block_reduce<kThreads>(top_without_mask, uint64_t(0), Max());
  row.without_mask = rank_index(top) == p.mask_token;
  row.max = rank_value(row.without_mask ? top_without_mask : top);
  if (top_without_mask == 0 || row.max == -INFINITY) return -INFINITY;

  const float scale = p.temperature > 0.f ? 1.f / p.temperature : 1.f;
  const float steps = kSteps / kReach * scale;
  float min_logit = -INFINITY;
  if (p.top_p < 1.f) {
    const ByProbability weight{row.max, scale};
    unsigned long long total = 0;
    row.each([&](int, float logit) {
      if (bucket_of(logit, row.max, steps) > 0) total += weight(logit);
    });
    total = block_reduce<kThreads>(total, 0ull, Sum());
    // A token is dropped when the more probable ones already sum to more than top_p.
    const auto share = (unsigned long long)(double(p.top_p) * double(total)) + 1;
    min_logit = logit_at_share(row, weight, steps, total, share);
  }
  if (p.top_k > 0 && p.top_k < p.vocab_size) {
    // If top-p keeps k tokens or more, its k-th is the k-th of all tokens. If it keeps fewer, its threshold is the higher one.
    min_logit = fmaxf(min_logit, logit_at_share(row, ByCount(), steps, p.vocab_size, p.top_k));
  }
  return min_logit;
}

template <class T>
__device__ __forceinline__ void top_k_top_p(const dllm_top_k_top_p_params& p) {
  const int row = blockIdx.x;
  if (row >= num_rows(p.count, p.max_rows)) return;
  const dllm_unmask_row table_row = at<const dllm_unmask_row>(p.rows)[row];
  const bool in_range = table_row.token >= 0 && table_row.token < p.num_tokens && table_row.logits_row >= 0 &&
                        table_row.logits_row < p.num_logits_rows;
  float result = -INFINITY;
  if (in_range && at<const int32_t>(p.tokens)[table_row.token] == p.mask_token) result = find_min_logit<T>(p, table_row);
  if (threadIdx.x == 0) at<float>(p.min_logit)[row] = result;
}

}  // namespace

#define TOP_K_TOP_P(name, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) name(DLLM_PARAMS dllm_top_k_top_p_params p) { top_k_top_p<T>(p); } \
  SOFTGPU_KERNEL(name)

TOP_K_TOP_P(top_k_top_p_bf16, __nv_bfloat16)
TOP_K_TOP_P(top_k_top_p_f16, __half)
TOP_K_TOP_P(top_k_top_p_f32, float)
