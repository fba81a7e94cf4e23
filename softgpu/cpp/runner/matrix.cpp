// ldmatrix and mma: operations of all 32 lanes of a warp.
#include "../include/softgpu/matrix.h"

#include <cstring>

#include "../include/cuda_bf16.h"
#include "../include/cuda_fp16.h"
#include "state.h"

namespace softgpu {

static void require_full_warp(const char* what) {
    if (runner_state->warp->exists != kFullMask) kernel_error("%s in a warp of fewer than 32 threads", what);
}

// ---- ldmatrix: 8x8 matrices of 16-bit elements, a row of 16 bytes from each of 8 lanes per matrix

constexpr int kMatrixRows = 8;
constexpr int kRowBytes = 16;

static uint16_t element(int matrix, int row, int column) {
    const int lane = block->current->warp * kWarpSize + matrix * kMatrixRows + row;
    uint16_t value;
    memcpy(&value, static_cast<char*>(block->fibers[lane].completed()) + column * 2, sizeof value);
    return value;
}

// Each lane reads its own row when it arrives, as early as the hardware may read it. So a store of another lane without a
// __syncwarp in between may be missed, and a later store is never seen.
void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row) {
    require_full_warp("ldmatrix");
    Fiber& self = *block->current;
    if (self.lane < count * kMatrixRows) {
        if (uintptr_t(row) % kRowBytes != 0) stop_kernel(Problem::Misaligned, "ldmatrix from %p: misaligned row", row);
        const bool is_shared = runner_state->shared.contains(row, kRowBytes);
        if (!is_shared) kernel_error("ldmatrix from %p, which is not shared memory", row);
        memcpy(self.to_publish(), row, kRowBytes);
    }
    wait_for_warp(WarpOp::LoadMatrix, kFullMask);
    const int major = self.lane / 4, minor = self.lane % 4 * 2;
    for (int matrix = 0; matrix < count; matrix++) {
        const uint32_t low = transposed ? element(matrix, minor, major) : element(matrix, major, minor);
        const uint32_t high = transposed ? element(matrix, minor + 1, major) : element(matrix, major, minor + 1);
        registers[matrix] = low | high << 16;
    }
}

// ---- mma.m16n8k16: a lane's part of the operands, and the product, computed once for the whole warp

constexpr int kM = 16, kN = 8, kK = 16;

struct Fragments {
    uint32_t a[4], b[2];
    float d[4];
};
static_assert(sizeof(Fragments) <= sizeof(Exchange), "the fragments of a lane must fit its exchange");

using Decode = float (*)(uint16_t);

// Register r of A holds row (lane / 4) + 8 * (r % 2), columns (lane % 4) * 2 + 8 * (r / 2) and the next.
template <Decode decode> static void decode_a(float (&a)[kM][kK], const Fragments& part, int lane) {
    for (int r = 0; r < 4; r++) {
        const int row = lane / 4 + 8 * (r % 2), column = lane % 4 * 2 + 8 * (r / 2);
        a[row][column] = decode(uint16_t(part.a[r]));
        a[row][column + 1] = decode(uint16_t(part.a[r] >> 16));
    }
}

// Register r of B holds rows (lane % 4) * 2 + 8 * r and the next, of column lane / 4.
template <Decode decode> static void decode_b(float (&b)[kK][kN], const Fragments& part, int lane) {
    for (int r = 0; r < 2; r++) {
        const int row = lane % 4 * 2 + 8 * r, column = lane / 4;
        b[row][column] = decode(uint16_t(part.b[r]));
        b[row + 1][column] = decode(uint16_t(part.b[r] >> 16));
    }
}

// Register r of C and D holds row (lane / 4) + 8 * (r / 2), column (lane % 4) * 2 + r % 2.
static float& accumulator(float (&d)[kM][kN], int lane, int r) {
    return d[lane / 4 + 8 * (r / 2)][lane % 4 * 2 + r % 2];
}

template <Decode decode> static void multiply(Fiber* lanes) {
    float a[kM][kK], b[kK][kN], d[kM][kN];
    for (int lane = 0; lane < kWarpSize; lane++) {
        const auto& part = *static_cast<const Fragments*>(lanes[lane].to_publish());
        decode_a<decode>(a, part, lane);
        decode_b<decode>(b, part, lane);
        for (int r = 0; r < 4; r++) accumulator(d, lane, r) = part.d[r];
    }
    for (int row = 0; row < kM; row++) {
        for (int k = 0; k < kK; k++) {
            for (int column = 0; column < kN; column++) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int lane = 0; lane < kWarpSize; lane++) {
        auto& part = *static_cast<Fragments*>(lanes[lane].to_publish());
        for (int r = 0; r < 4; r++) part.d[r] = accumulator(d, lane, r);
    }
}

static void mma(float* d, const uint32_t* a, const uint32_t* b, Combine combine) {
    require_full_warp("mma");
    Fiber& self = *block->current;
    auto& part = *static_cast<Fragments*>(self.to_publish());
    memcpy(part.a, a, sizeof part.a);
    memcpy(part.b, b, sizeof part.b);
    memcpy(part.d, d, sizeof part.d);
    wait_for_warp(WarpOp::MultiplyMatrices, kFullMask, combine);
    memcpy(d, static_cast<const Fragments*>(self.completed())->d, sizeof part.d);
}

void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b) { mma(d, a, b, multiply<bf16_to_float>); }
void mma_m16n8k16_f16(float* d, const uint32_t* a, const uint32_t* b) { mma(d, a, b, multiply<half_to_float>); }

}  // namespace softgpu
