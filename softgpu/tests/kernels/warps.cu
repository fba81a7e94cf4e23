// Warp operations, correct and with mistakes.
#include "softgpu.h"

constexpr unsigned kAll = 0xffffffffu;

// One line of 32 results per operation.
extern "C" __global__ void warp_operations(int* out) {
    const int lane = threadIdx.x;
    int line = 0;
    auto put = [&](int value) { out[32 * line++ + lane] = value; };
    put(__shfl_sync(kAll, lane * 10, 5));
    put(__shfl_sync(kAll, lane * 10, 5, 8));
    put(__shfl_up_sync(kAll, lane, 3));
    put(__shfl_up_sync(kAll, lane, 3, 16));
    put(__shfl_down_sync(kAll, lane, 3));
    put(__shfl_down_sync(kAll, lane, 3, 16));
    put(__shfl_xor_sync(kAll, lane, 9));
    put(int(__ballot_sync(kAll, lane % 3 == 0)));
    put(__any_sync(kAll, lane == 31) * 2 + __any_sync(kAll, lane == 32));
    put(__all_sync(kAll, lane < 32) * 2 + __all_sync(kAll, lane < 31));
    put(__reduce_add_sync(kAll, lane));
    put(__reduce_min_sync(kAll, lane - 7));
    put(int(__reduce_max_sync(kAll, unsigned(lane - 7))));
}
SOFTGPU_KERNEL(warp_operations)

// The two halves of the warp work independently, with different numbers of iterations.
extern "C" __global__ void half_warps(int* out) {
    const int lane = threadIdx.x;
    const bool lower = lane < 16;
    const unsigned mask = lower ? 0x0000ffffu : 0xffff0000u;
    int value = lane;
    for (int i = 0; i < (lower ? 1 : 5); i++) value = __reduce_add_sync(mask, value);
    __syncwarp();
    out[lane] = value;
}
SOFTGPU_KERNEL(half_warps)

// Some threads return before the barrier that the others reach.
extern "C" __global__ void early_exit(const int* x, int* out, int live_threads) {
    __shared__ int values[128];
    if (int(threadIdx.x) >= live_threads) return;
    values[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = values[live_threads - 1 - threadIdx.x];
}
SOFTGPU_KERNEL(early_exit)

// A shuffle of 32 lanes, some of which have returned.
extern "C" __global__ void shuffle_after_exit(int* out) {
    if (threadIdx.x >= 20) return;
    out[threadIdx.x] = __shfl_xor_sync(kAll, int(threadIdx.x), 1);
}
SOFTGPU_KERNEL(shuffle_after_exit)

// The same with the remaining lanes; __syncwarp does not wait for the others.
extern "C" __global__ void shuffle_among_live(int* out) {
    if (threadIdx.x >= 20) return;
    __syncwarp();
    out[threadIdx.x] = __shfl_xor_sync(0x000fffffu, int(threadIdx.x), 1);
}
SOFTGPU_KERNEL(shuffle_among_live)

// Wrong masks, by kind.
extern "C" __global__ void wrong_mask(int kind, int* out) {
    const int lane = threadIdx.x;
    int value = lane;
    if (kind == 0) value = __shfl_sync(0x0000ffffu, lane, 0);                          // lacks the caller
    if (kind == 1) value = __shfl_xor_sync(lane < 16 ? kAll : 0xffff8000u, lane, 1);   // differs between its lanes
    if (kind == 2) value = lane < 16 ? __shfl_xor_sync(0x0000ffffu, lane, 16) : lane;  // reads a lane outside the mask
    if (kind == 3) value = lane < 16 ? __shfl_xor_sync(kAll, lane, 1) : int(__ballot_sync(kAll, 1));
    out[lane] = value;
}
SOFTGPU_KERNEL(wrong_mask)

// One lane stores, another loads, with and without __syncwarp between them.
extern "C" __global__ void warp_exchange(int with_sync, int* out) {
    __shared__ int values[32];
    values[threadIdx.x] = int(threadIdx.x);
    if (with_sync) __syncwarp();
    out[threadIdx.x] = values[threadIdx.x ^ 1];
}
SOFTGPU_KERNEL(warp_exchange)
