// One function per PTX instruction that CUDA C++ has no name for, named after the instruction. Kernels have no `asm` of
// their own. With SOFTGPU defined, the second branch of each runs on the host.
//
// What needs sm_80: cp.async, ldmatrix (sm_75), mma.m16n8k16. See the PTX ISA manual, sections "Data movement and
// conversion instructions: asynchronous copy" and "Warp-level matrix instructions".
#pragma once
#include <stdint.h>

#ifdef SOFTGPU
#include "softgpu.h"
#else

// The address of shared memory as the instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#endif

// ---- Asynchronous copies, from global to shared memory
//
// Each copies `source_bytes` and fills the rest of its 4, 8 or 16 bytes with zeros; with 0 the source is not read, but
// must be an aligned address all the same. Both addresses are multiples of the size.

// 16 bytes past the L1 cache: cp.async.cg
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int source_bytes = 16) {
#ifdef SOFTGPU
    softgpu::cp_async(shared, global, 16, source_bytes);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
#endif
}

// 8 bytes through the L1 cache: cp.async.ca
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, int source_bytes = 8) {
#ifdef SOFTGPU
    softgpu::cp_async(shared, global, 8, source_bytes);
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
#endif
}

// 4 bytes through the L1 cache: cp.async.ca
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, int source_bytes = 4) {
#ifdef SOFTGPU
    softgpu::cp_async(shared, global, 4, source_bytes);
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
#endif
}

// Closes a group of the copies that this thread issued since the last one.
__device__ __forceinline__ void cp_async_commit_group() {
#ifdef SOFTGPU
    softgpu::cp_async_commit_group();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of this thread's groups are in flight. Other threads see the data after a barrier.
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
// Lane 8 * m + r passes the address of row r of matrix m, 16 bytes at a multiple of 16; addresses of lanes past the
// last matrix are not used. Register m then holds, of matrix m, row lane / 4 and columns lane % 4 * 2 and the next;
// with _trans, of its transpose. All 32 lanes take part.

__device__ __forceinline__ void ldmatrix_x1(uint32_t (&r)[1], const void* row) {
#ifdef SOFTGPU
    softgpu::ldmatrix(r, 1, false, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
#ifdef SOFTGPU
    softgpu::ldmatrix(r, 2, false, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

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

__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row) {
#ifdef SOFTGPU
    softgpu::ldmatrix(r, 1, true, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
#ifdef SOFTGPU
    softgpu::ldmatrix(r, 2, true, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
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

// ---- mma: d += a * b, with a of 16 x 16 elements, b of 16 x 8, d of 16 x 8 floats, spread over the lanes of a warp
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

// ---- Loads and stores of 16 bytes that are used once

// Read-only for the whole kernel, and not kept in the L1 cache: ld.global.nc.L1::no_allocate
__device__ __forceinline__ uint4 ld_global_nc_16(const void* global) {
#ifdef SOFTGPU
    return *static_cast<const uint4*>(global);
#else
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
#endif
}

// First to be evicted: ld.global.cs
__device__ __forceinline__ uint4 ld_global_cs_16(const void* global) {
#ifdef SOFTGPU
    return *static_cast<const uint4*>(global);
#else
    uint4 v;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global)
                 : "memory");
    return v;
#endif
}

// First to be evicted: st.global.cs
__device__ __forceinline__ void st_global_cs_16(void* global, uint4 v) {
#ifdef SOFTGPU
    *static_cast<uint4*>(global) = v;
#else
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
#endif
}

// ---- Stores that the host sees

// One word, whole; before a fence for the whole system it says nothing about what was stored before: st.relaxed.sys
__device__ __forceinline__ void st_relaxed_sys(int32_t* global, int32_t v) {
#ifdef SOFTGPU
    __atomic_store_n(global, v, __ATOMIC_RELAXED);
#else
    asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(global), "r"(v) : "memory");
#endif
}

// ---- Arithmetic

// 2^x to about 22 bits; results and arguments too small for a normal float become 0: ex2.approx.ftz.f32
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
