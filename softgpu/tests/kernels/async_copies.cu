// cp.async, correct and with each kind of mistake.
#include "ptx.cuh"

enum Mistake {
    kNone = 0,
    kNoWait = 1,
    kNoCommit = 2,
    kWaitTooShort = 3,
    kNoBarrier = 4,
    kNotShared = 5,
    kMisaligned = 6,
};

// Each thread copies 16 bytes of x twice, in two groups, and writes the values that its neighbour copied.
extern "C" __global__ void copy_two_groups(int mistake, const float* x, float* out) {
    DYNAMIC_SHARED(bytes);
    const int thread = threadIdx.x, threads = blockDim.x;
    float* first = reinterpret_cast<float*>(bytes);
    float* second = first + 4 * threads;

    if (mistake == kNotShared) cp_async_16(out, x);
    if (mistake == kMisaligned) cp_async_16(first, x + 1);
    cp_async_16(first + 4 * thread, x + 4 * thread);
    cp_async_commit_group();
    cp_async_16(second + 4 * thread, x + 4 * (threads + thread));
    if (mistake != kNoCommit) cp_async_commit_group();

    if (mistake == kWaitTooShort) cp_async_wait_group<1>();
    if (mistake == kNone || mistake == kNoCommit || mistake == kNoBarrier) cp_async_wait_group<0>();
    if (mistake != kNoBarrier) __syncthreads();

    const int neighbour = (thread + 37) % threads;
    for (int i = 0; i < 4; i++) {
        out[4 * thread + i] = first[4 * neighbour + i];
        out[4 * (threads + thread) + i] = second[4 * neighbour + i];
    }
}
SOFTGPU_KERNEL(copy_two_groups)

// Two rounds through one buffer. Without the barrier between them, the second overwrites values that others still read.
extern "C" __global__ void reuse_buffer(int with_barrier, const float* x, float* out) {
    __shared__ __align__(16) float buffer[4 * 64];
    const int thread = threadIdx.x, threads = blockDim.x;
    for (int round = 0; round < 2; round++) {
        const float* source = x + 4 * threads * round;
        cp_async_16(buffer + 4 * thread, source + 4 * thread);
        cp_async_wait_all();
        __syncthreads();
        out[threads * round + thread] = buffer[4 * ((thread + 37) % threads)];
        if (with_barrier) __syncthreads();
    }
}
SOFTGPU_KERNEL(reuse_buffer)

// The three sizes, each with a part of the source, then zeros. Kernels of cuda/ use 16 bytes only.
extern "C" __global__ void copy_with_zeros(int source_bytes, const unsigned* x, unsigned* out) {
    __shared__ __align__(16) unsigned values[8];
    if (threadIdx.x == 0) {
        softgpu::cp_async(values, x, 4, min(source_bytes, 4));
        softgpu::cp_async(values + 2, x, 8, min(source_bytes, 8));
        cp_async_16(values + 4, x, source_bytes);
        cp_async_wait_all();
    }
    __syncthreads();
    if (threadIdx.x < 8 && threadIdx.x != 1) out[threadIdx.x] = values[threadIdx.x];
}
SOFTGPU_KERNEL(copy_with_zeros)

// Stores to the source of a copy in flight: the copy may see the old values or the new.
extern "C" __global__ void change_source(float* x, float* out) {
    __shared__ float values[32];
    const int thread = threadIdx.x;
    softgpu::cp_async(values + thread, x + thread, 4, 4);
    x[thread] = 2.0f;
    cp_async_wait_all();
    out[thread] = values[thread];
}
SOFTGPU_KERNEL(change_source)
