// gather_scatter: gather and scatter of rows of bytes by an index list in device memory. Launch: src/ops/gather_scatter.rs.
//
// grid   (max_rows). A block copies one row; blocks past the count return.
// block  256 threads of 16 bytes each at a time, four loads per thread in flight
// shared none
// bytes  2 * row_bytes per row
// bound  memory bandwidth
#include "memory.cuh"

namespace {

constexpr int kThreads = 256;

template <bool kGather>
__device__ __forceinline__ void copy(const dllm_gather_scatter_params& p) {
  const int row = blockIdx.x;
  if (row >= num_rows(p.count, p.max_rows)) return;
  const int indexed = at<const int32_t>(p.index)[row];
  if (indexed < 0 || indexed >= p.num_indexed_rows) {
    if (p.failed && threadIdx.x == 0) *at<int32_t>(p.failed) = DLLM_INDEX_FAILED;
    return;
  }
  const int64_t from = kGather ? indexed : row, to = kGather ? row : indexed;
  copy_row<kThreads>(at<const uint4>(p.source, from * (p.source_stride_bytes / 16)),
                     at<uint4>(p.target, to * (p.target_stride_bytes / 16)), int(p.row_bytes / 16));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) gather_rows(DLLM_PARAMS dllm_gather_scatter_params p) { copy<true>(p); }
SOFTGPU_KERNEL(gather_rows)

extern "C" __global__ void __launch_bounds__(kThreads) scatter_rows(DLLM_PARAMS dllm_gather_scatter_params p) { copy<false>(p); }
SOFTGPU_KERNEL(scatter_rows)
