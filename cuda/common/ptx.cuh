// One function per PTX instruction that has no CUDA C++ intrinsic, named after the instruction; the only `asm` of cuda/.
// Each has two branches: with SOFTGPU defined, the first runs on the host in the CUDA emulator.
//
// Minimum architectures: cp.async and mma.m16n8k16 need sm_80, ldmatrix sm_75. See the PTX ISA manual, sections "Data
// movement and conversion instructions: asynchronous copy" and "Warp-level matrix instructions".
#pragma once
#include <stdint.h>

#ifdef SOFTGPU
#include "softgpu.h"
#else

// Converts a pointer to an address in shared memory, the operand of the instructions below.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#endif

// ---- Asynchronous copies, from global to shared memory
//
// Copies `source_bytes` and fills the rest of the 16 bytes with zeros. With 0 the source is not read, but must still be an
// aligned address. Both addresses are multiples of 16. Bypasses the L1 cache: cp.async.cg
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int source_bytes = 16) {
#ifdef SOFTGPU
    softgpu::cp_async(shared, global, 16, source_bytes);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
#endif
}

// Closes a group: all copies that this thread issued since the previous group.
__device__ __forceinline__ void cp_async_commit_group() {
#ifdef SOFTGPU
    softgpu::cp_async_commit_group();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's groups are in flight. Other threads see the data after a barrier.
template <int kPending> __device__ __forceinline__ void cp_async_wait_group() {
#ifdef SOFTGPU
    softgpu::cp_async_wait_group(kPending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits for all of this thread's copies, committed or not.
__device__ __forceinline__ void cp_async_wait_all() {
#ifdef SOFTGPU
    softgpu::cp_async_wait_all();
#else
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- ldmatrix: 8 x 8 matrices of 16-bit elements from shared memory
//
// Lane 8 * m + r passes the address of row r of matrix m: 16 bytes, at a multiple of 16. Register m then holds row lane / 4,
// columns lane % 4 * 2 and the next, of matrix m; with _trans, of its transpose. All 32 lanes take part.

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef SOFTGPU
    softgpu::ldmatrix(r, 4, false, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef SOFTGPU
    softgpu::ldmatrix(r, 4, true, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// ---- mma: d += a * b, with a of 16 x 16 elements, b of 16 x 8, d of 16 x 8 floats, distributed over the lanes of a warp
//
// Register r of a: row lane / 4 + 8 * (r % 2), columns lane % 4 * 2 + 8 * (r / 2) and the next.
// Register r of b: rows lane % 4 * 2 + 8 * r and the next, of column lane / 4.
// Register r of d: row lane / 4 + 8 * (r / 2), column lane % 4 * 2 + r % 2.

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef SOFTGPU
    softgpu::mma_m16n8k16_bf16(d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef SOFTGPU
    softgpu::mma_m16n8k16_f16(d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- Stores to memory that the host reads

// Atomic store of one 32-bit value, without ordering. A system-wide fence before it orders earlier stores: st.relaxed.sys
__device__ __forceinline__ void st_relaxed_sys(int32_t* global, int32_t v) {
#ifdef SOFTGPU
    __atomic_store_n(global, v, __ATOMIC_RELAXED);
#else
    asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(global), "r"(v) : "memory");
#endif
}

// ---- Arithmetic

// 2^x to about 22 bits; subnormal arguments and results are flushed to 0: ex2.approx.ftz.f32
__device__ __forceinline__ float ex2_approx(float x) {
#ifdef SOFTGPU
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
