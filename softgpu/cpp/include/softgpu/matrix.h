// ldmatrix and mma, with the register layouts of the PTX ISA manual ("Warp-level matrix instructions").
#pragma once
#include <stdint.h>

namespace softgpu {

// ldmatrix.sync.aligned.m8n8.x{count}{.trans}.shared.b16: lane 8 * m + r passes the address of row r of matrix m.
void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row);

// mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32: d += a * b.
// Products are added in f32, in order of k; a tensor core rounds differently.
void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b);
void mma_m16n8k16_f16(float* d, const uint32_t* a, const uint32_t* b);

}  // namespace softgpu
