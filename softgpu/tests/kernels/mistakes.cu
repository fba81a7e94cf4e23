// Kernels with one mistake each.
#include "softgpu.h"

// A 16-byte load from an address that is a multiple of 4 only.
extern "C" __global__ void misaligned_load(const float* x, float* out) {
    const float4 v = *reinterpret_cast<const float4*>(x + threadIdx.x);
    out[threadIdx.x] = v.x + v.w;
}
SOFTGPU_KERNEL(misaligned_load)

// 64 threads write to 32 elements.
extern "C" __global__ void array_overrun(const float* x, float* out) {
    __shared__ float slots[32];
    slots[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = slots[threadIdx.x];
}
SOFTGPU_KERNEL(array_overrun)

// Half of the warp waits at one barrier, half at another.
extern "C" __global__ void split_barriers(const float* x, float* out) {
    if (threadIdx.x < 16) {
        __syncthreads();
    } else {
        __syncwarp();
    }
    out[threadIdx.x] = x[threadIdx.x];
}
SOFTGPU_KERNEL(split_barriers)

extern "C" __global__ void divide_by_zero(const int* x, int* out) { out[threadIdx.x] = 1 / x[threadIdx.x]; }
SOFTGPU_KERNEL(divide_by_zero)

// Accesses one element past the end of dynamic shared memory.
extern "C" __global__ void dynamic_shared_overrun(int elements, float* out) {
    DYNAMIC_SHARED(bytes);
    float* values = reinterpret_cast<float*>(bytes);
    for (int i = threadIdx.x; i < elements; i += blockDim.x) values[i] = float(i);
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x];
}
SOFTGPU_KERNEL(dynamic_shared_overrun)

// Reads shared memory that no thread wrote.
extern "C" __global__ void unwritten_shared(int dynamic, float* out) {
    DYNAMIC_SHARED(bytes);
    __shared__ float fixed[64];
    out[threadIdx.x] = dynamic ? reinterpret_cast<float*>(bytes)[threadIdx.x] : fixed[threadIdx.x];
    fixed[threadIdx.x] = 0.0f;
    reinterpret_cast<float*>(bytes)[threadIdx.x] = 0.0f;
}
SOFTGPU_KERNEL(unwritten_shared)

__device__ __noinline__ int recurse(int depth, volatile int* sink) {
    volatile int frame[64];
    frame[0] = *sink = depth;
    return depth == 0 ? 0 : frame[0] + recurse(depth - 1, frame);
}

extern "C" __global__ void deep_recursion(int depth, int* out) { out[0] = recurse(depth, out); }
SOFTGPU_KERNEL(deep_recursion)
