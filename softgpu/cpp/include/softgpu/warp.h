// Warp operations. Each publishes the lane's value, waits for the lanes of the mask, and reads what the others
// published.
#pragma once
#include "softgpu/runtime.h"

namespace softgpu {

inline int lane_id() { return block->current->lane; }

template <class T> inline void exchange(WarpOp operation, unsigned mask, T value) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "warp operations take up to 8 bytes");
    memcpy(block->current->to_publish(), &value, sizeof value);
    wait_for_warp(operation, mask);
}

// Reading from a lane outside the mask is undefined on a GPU; here it is an error.
template <class T> inline T read_lane(unsigned mask, int source) {
    if (!(mask >> source & 1)) kernel_error("shuffle reads lane %d, which is not in the mask %#x", source, mask);
    if (!(existing_lanes() >> source & 1)) kernel_error("shuffle reads lane %d, which the block does not have", source);
    return published_by<T>(source);
}

template <class T> inline T shuffle(unsigned mask, T value, int source) {
    exchange(WarpOp::Shuffle, mask, value);
    return read_lane<T>(mask, source);
}

inline int segment_start(int width) { return lane_id() & ~(width - 1); }

// Lanes of the mask that exist: the last warp of a block may be short.
inline unsigned present(unsigned mask) { return mask & existing_lanes(); }

inline unsigned ballot(unsigned mask, bool predicate) {
    exchange(WarpOp::Vote, mask, predicate);
    unsigned votes = 0;
    for (int lane = 0; lane < kWarpSize; lane++) {
        if ((present(mask) >> lane & 1) && published_by<bool>(lane)) votes |= 1u << lane;
    }
    return votes;
}

template <class T, class Function> inline T reduce(unsigned mask, T value, Function function) {
    exchange(WarpOp::Reduce, mask, value);
    const int first = __builtin_ctz(mask);  // exists: the calling lane is in the mask, and missing lanes come last
    T result = published_by<T>(first);
    for (int lane = first + 1; lane < kWarpSize; lane++) {
        if (present(mask) >> lane & 1) result = function(result, published_by<T>(lane));
    }
    return result;
}

}  // namespace softgpu

inline void __syncwarp(unsigned mask = softgpu::kFullMask) { softgpu::wait_for_warp(softgpu::WarpOp::Sync, mask); }

template <class T> inline T __shfl_sync(unsigned mask, T value, int source, int width = softgpu::kWarpSize) {
    return softgpu::shuffle(mask, value, softgpu::segment_start(width) + (source & (width - 1)));
}

// The three functions below return the lane's own value if the source is outside its segment.
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = softgpu::kWarpSize) {
    const int source = softgpu::lane_id() ^ lane_mask;
    const bool inside = source < softgpu::segment_start(width) + width;
    return softgpu::shuffle(mask, value, inside ? source : softgpu::lane_id());
}

template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = softgpu::kWarpSize) {
    const int source = softgpu::lane_id() + int(delta);
    const bool inside = source < softgpu::segment_start(width) + width;
    return softgpu::shuffle(mask, value, inside ? source : softgpu::lane_id());
}

template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = softgpu::kWarpSize) {
    const int source = softgpu::lane_id() - int(delta);
    const bool inside = source >= softgpu::segment_start(width);
    return softgpu::shuffle(mask, value, inside ? source : softgpu::lane_id());
}

inline unsigned __ballot_sync(unsigned mask, int predicate) { return softgpu::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return softgpu::ballot(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return softgpu::ballot(mask, predicate == 0) == 0; }

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    return softgpu::reduce(mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline int __reduce_add_sync(unsigned mask, int value) { return int(__reduce_add_sync(mask, unsigned(value))); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    return softgpu::reduce(mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline int __reduce_min_sync(unsigned mask, int value) {
    return softgpu::reduce(mask, value, [](int a, int b) { return a < b ? a : b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    return softgpu::reduce(mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline int __reduce_max_sync(unsigned mask, int value) {
    return softgpu::reduce(mask, value, [](int a, int b) { return a > b ? a : b; });
}
