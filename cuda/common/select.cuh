// Selection of the k largest of n keys by one block: radix select.
#pragma once
#include "memory.cuh"
#include "reduce.cuh"

// Buckets of one radix digit: 8 bits.
constexpr int kBuckets = 256;

// Finds the bucket that contains the k-th largest element (k from 1), given the content of each bucket; `above` is the sum
// of the contents of all higher buckets. All threads of the block (256 or more) must call it together, the first 256 with
// the content of bucket threadIdx.x. The sum of the contents must be at least k and not zero.
template <class T>
struct Bucket {
  int digit;
  T above, content;
};
template <class T>
__device__ __forceinline__ Bucket<T> find_bucket(T content, T k) {
  constexpr int kWarps = kBuckets / kWarp;
  __shared__ T warp_total[kWarps];
  __shared__ Bucket<T> found;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // Sum of the contents of this bucket and of higher ones in the warp.
  T sum = content;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const T other = __shfl_down_sync(kAllLanes, sum, lanes);
    if (lane + lanes < kWarp) sum += other;
  }
  __syncthreads();  // the result of the previous call has been read
  if (lane == 0 && warp < kWarps) warp_total[warp] = sum;
  __syncthreads();
  T above = sum - content;
  for (int w = warp + 1; w < kWarps; w++) above += warp_total[w];
  if (warp < kWarps && above < k && k <= above + content) found = {int(threadIdx.x), above, content};
  __syncthreads();
  return found;
}

// Returns a bound that exactly k of the n keys reach, 1 <= k <= n; the same in all threads. Keys must be distinct, except
// for any number of zeros that are not among the k largest. All threads of the block, which has 256, must call it together.
// `keys[i]` is a uint64_t: an array, or an object that computes keys on request.
template <class Keys>
__device__ __forceinline__ uint64_t kth_largest(const Keys& keys, int n, int k) {
  __shared__ int histogram[kBuckets];
  uint64_t prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kBuckets) {
      const uint64_t key = keys[i];
      if (shift == 56 || key >> (shift + 8) == prefix) atomicAdd(&histogram[key >> shift & 255], 1);
    }
    __syncthreads();
    const Bucket<int> bucket = find_bucket(histogram[threadIdx.x], k);
    prefix = prefix << 8 | uint32_t(bucket.digit);
    k -= bucket.above;
    if (k == bucket.content) return prefix << shift;
  }
  return prefix;
}
