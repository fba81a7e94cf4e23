// ldmatrix and mma.
#include "ptx.cuh"

// One 16 x 8 tile of a product by one warp: d[16, 8] = a[16, k] * b, where b is [8, k] or, with kTransposed, [k, 8].
template <bool kHalf, bool kTransposed>
__device__ __forceinline__ void tile_product(int k, const uint16_t* a, const uint16_t* b, float* d) {
    __shared__ __align__(16) uint16_t a_tile[16][16], b_tile[16 * 8];
    const int lane = threadIdx.x;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int start = 0; start < k; start += 16) {
        __syncwarp();
        for (int i = lane; i < 256; i += 32) a_tile[i / 16][i % 16] = a[i / 16 * k + start + i % 16];
        for (int i = lane; i < 128; i += 32) {
            b_tile[i] = kTransposed ? b[start * 8 + i] : b[i / 16 * k + start + i % 16];
        }
        __syncwarp();
        uint32_t a_part[4], b_part[2];
        ldmatrix_x4(a_part, &a_tile[lane % 16][lane / 16 * 8]);
        const uint16_t* b_row = &b_tile[kTransposed ? lane % 16 * 8 : lane % 8 * 16 + lane / 8 % 2 * 8];
        softgpu::ldmatrix(b_part, 2, kTransposed, b_row);
        if (kHalf) {
            mma_m16n8k16_f16(sum, a_part, b_part);
        } else {
            mma_m16n8k16_bf16(sum, a_part, b_part);
        }
    }
    for (int r = 0; r < 4; r++) d[(lane / 4 + 8 * (r / 2)) * 8 + lane % 4 * 2 + r % 2] = sum[r];
}

extern "C" __global__ void tile_bf16(int k, const uint16_t* a, const uint16_t* b, float* d) {
    tile_product<false, false>(k, a, b, d);
}
SOFTGPU_KERNEL(tile_bf16)

extern "C" __global__ void tile_bf16_trans(int k, const uint16_t* a, const uint16_t* b, float* d) {
    tile_product<false, true>(k, a, b, d);
}
SOFTGPU_KERNEL(tile_bf16_trans)

extern "C" __global__ void tile_f16(int k, const uint16_t* a, const uint16_t* b, float* d) {
    tile_product<true, false>(k, a, b, d);
}
SOFTGPU_KERNEL(tile_f16)

// 0: only a part of the warp calls mma; 1: misaligned rows; 2: rows in global memory; 3: correct, in a loop
extern "C" __global__ void mma_participation(int kind, const uint16_t* x, float* out) {
    __shared__ __align__(16) uint16_t rows[8 * 16];
    const int lane = threadIdx.x;
    for (int i = lane; i < 128; i += 32) rows[i] = 0;
    __syncwarp();
    uint32_t a[4] = {}, b[2] = {}, loaded[1];
    float d[4] = {};
    if (kind == 1) softgpu::ldmatrix(loaded, 1, false, rows + 1);
    if (kind == 2) softgpu::ldmatrix(loaded, 1, false, x);
    if (kind != 0 || lane < 16) mma_m16n8k16_bf16(d, a, b);
    for (int i = 0; kind == 3 && i < 1000; i++) mma_m16n8k16_bf16(d, a, b);
    __syncwarp();
    out[lane] = d[0];
}
SOFTGPU_KERNEL(mma_participation)

// ldmatrix.x1, .x1.trans and .x4.trans, and ex2.approx
extern "C" __global__ void load_forms(const uint16_t* x, uint32_t* out, float* powers) {
    __shared__ __align__(16) uint16_t tiles[4][8][8];
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) (&tiles[0][0][0])[i] = x[i];
    __syncwarp();
    uint32_t one[1], one_trans[1], four_trans[4];
    softgpu::ldmatrix(one, 1, false, tiles[0][lane % 8]);
    softgpu::ldmatrix(one_trans, 1, true, tiles[0][lane % 8]);
    ldmatrix_x4_trans(four_trans, tiles[lane / 8][lane % 8]);
    out[lane] = one[0];
    out[32 + lane] = one_trans[0];
    for (int m = 0; m < 4; m++) out[64 + 32 * m + lane] = four_trans[m];
    powers[lane] = ex2_approx(float(lane - 16));
}
SOFTGPU_KERNEL(load_forms)
