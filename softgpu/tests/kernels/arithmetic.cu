// Atomics, conversions and intrinsics.
#include "softgpu.h"

struct Counters {
    unsigned sum, maximum, minimum, bits, exchanged, swapped;
    int signed_sum, signed_minimum;
    unsigned long long wide;
    float real;
    unsigned order_sum;
};

extern "C" __global__ void atomics(Counters* c) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    c->order_sum += 0;  // a plain access next to the atomics
    atomicAdd(&c->sum, i);
    atomicMax(&c->maximum, i);
    atomicMin(&c->minimum, i);
    atomicOr(&c->bits, 1u << (i % 32));
    atomicExch(&c->exchanged, 7u);
    atomicCAS(&c->swapped, 0u, i + 1);
    atomicAdd(&c->signed_sum, -int(i));
    atomicMin(&c->signed_minimum, -int(i));
    atomicAdd(&c->wide, (unsigned long long)i << 32);
    atomicAdd(&c->real, 0.5f);
}
SOFTGPU_KERNEL(atomics)

// Converts all 65536 values of 16 bits to float, and floats to 16 bits.
extern "C" __global__ void widen(float* from_bf16, float* from_half) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    from_bf16[i] = __bfloat162float(__ushort_as_bfloat16((unsigned short)i));
    from_half[i] = __half2float(__ushort_as_half((unsigned short)i));
}
SOFTGPU_KERNEL(widen)

extern "C" __global__ void narrow(int n, const float* x, unsigned short* to_bf16, unsigned short* to_half) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    to_bf16[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
    to_half[i] = __half_as_ushort(__float2half_rn(x[i]));
}
SOFTGPU_KERNEL(narrow)

extern "C" __global__ void intrinsics(unsigned long long* out) {
    int line = 0;
    auto put = [&](unsigned long long value) { out[line++] = value; };
    put(__umulhi(0xffffffffu, 0xffffffffu));
    put(__umul64hi(0xffffffffffffffffull, 0xffffffffffffffffull));
    put(__popc(0xf0f0u));
    put(__ffs(0x100));
    put(__clz(1));
    put(__clzll(1));
    put(__clz(0));
    put(__brev(0x00000001u));
    put(__float_as_uint(__fmul_rn(3.0f, 0.5f)));
    put(__float_as_uint(__fmaf_rn(1.0f + 0x1p-12f, 1.0f + 0x1p-12f, -1.0f)));
    put(__float_as_uint(min(2.0f, 1.0f)));
    put((unsigned long long)max(-1ll, -2ll));
    put(blockDim.x * 1000 + blockDim.y * 100 + gridDim.x * 10 + warpSize);
}
SOFTGPU_KERNEL(intrinsics)
