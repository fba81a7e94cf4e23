#include "softgpu.h"

// y += a * x, one thread per element.
extern "C" __global__ void saxpy(int n, float a, const float* x, float* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += a * x[i];
}
SOFTGPU_KERNEL(saxpy)

// The same without the bound.
extern "C" __global__ void saxpy_unbounded(int n, float a, const float* x, float* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] += a * x[i];
}
SOFTGPU_KERNEL(saxpy_unbounded)
