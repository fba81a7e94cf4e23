#include "softgpu.h"

struct SumParams {
    const float* x;
    float* out;
    int n, padding;
};

// out[b] = sum(x[b * n .. b * n + n]), one block per output.
template <bool kBarrier> __device__ __forceinline__ void block_sum_body(const SumParams& p) {
    const float* x = p.x + size_t(blockIdx.x) * p.n;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < p.n; i += blockDim.x) sum += x[i];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);

    __shared__ float partial[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) partial[warp] = sum;
    if (kBarrier) __syncthreads();
    if (warp != 0) return;
    sum = lane < int(blockDim.x / 32) ? partial[lane] : 0.0f;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) p.out[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256) block_sum(const __grid_constant__ SumParams p) {
    block_sum_body<true>(p);
}
SOFTGPU_KERNEL(block_sum)

// The same without the barrier.
extern "C" __global__ void __launch_bounds__(256) block_sum_racy(const __grid_constant__ SumParams p) {
    block_sum_body<false>(p);
}
SOFTGPU_KERNEL(block_sum_racy)

struct ArgmaxParams {
    const __nv_bfloat16* x;
    int* index;
    float* share;  // softmax of the largest element
    int n, padding;
};

struct Best {
    float value, sum;
    int index;
};

__device__ __forceinline__ Best merge(Best a, Best b) {
    const bool take_b = b.value > a.value || (b.value == a.value && b.index < a.index);
    Best r = take_b ? b : a;
    r.sum = a.sum * __expf(a.value - r.value) + b.sum * __expf(b.value - r.value);
    return r;
}

__device__ __forceinline__ Best merge_warp(Best best) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        Best other;
        other.value = __shfl_xor_sync(0xffffffffu, best.value, offset);
        other.sum = __shfl_xor_sync(0xffffffffu, best.sum, offset);
        other.index = __shfl_xor_sync(0xffffffffu, best.index, offset);
        best = merge(best, other);
    }
    return best;
}

// Index and softmax of the largest element of each row of n elements (a multiple of 8); one block per row.
extern "C" __global__ void __launch_bounds__(512) argmax_share(const __grid_constant__ ArgmaxParams p) {
    const __nv_bfloat16* row = p.x + size_t(blockIdx.x) * p.n;
    Best best{-1e30f, 0.0f, 0x7fffffff};
    for (int start = threadIdx.x * 8; start < p.n; start += blockDim.x * 8) {
        const uint4 packed = *reinterpret_cast<const uint4*>(row + start);
        const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
        for (int j = 0; j < 4; j++) {
            const float2 pair = __bfloat1622float2(pairs[j]);
            best = merge(best, {pair.x, 1.0f, start + 2 * j});
            best = merge(best, {pair.y, 1.0f, start + 2 * j + 1});
        }
    }
    best = merge_warp(best);
    __shared__ Best partial[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) partial[warp] = best;
    __syncthreads();
    if (warp != 0) return;
    best = merge_warp(lane < int(blockDim.x / 32) ? partial[lane] : Best{-1e30f, 0.0f, 0x7fffffff});
    if (lane == 0) {
        p.index[blockIdx.x] = best.index;
        p.share[blockIdx.x] = 1.0f / best.sum;
    }
}
SOFTGPU_KERNEL(argmax_share)
