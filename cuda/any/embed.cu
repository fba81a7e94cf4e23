// embed: copies the embedding rows of tokens in device memory. Launch: src/ops/embed.rs.
//
// grid   (max_rows). A block copies one row; blocks past the count return.
// block  256 threads of 16 bytes each at a time, four loads per thread in flight
// shared none
// bytes  2 * row_bytes per row
// bound  memory bandwidth; at 32 rows the latency of three dependent loads (index, token, row)
#include "memory.cuh"

namespace {
constexpr int kThreads = 256;
}

extern "C" __global__ void __launch_bounds__(kThreads) embed(DLLM_PARAMS dllm_embed_params p) {
  const int row = blockIdx.x;
  if (row >= num_rows(p.count, p.max_rows)) return;
  const int index = p.index ? at<const int32_t>(p.index)[row] : row;
  const bool in_range = index >= 0 && index < p.num_tokens;
  const int token = in_range ? at<const int32_t>(p.tokens)[index] : -1;
  if (token < 0 || token >= p.vocab_size) {
    if (p.failed && threadIdx.x == 0) *at<int32_t>(p.failed) = DLLM_INDEX_FAILED;
    return;
  }
  copy_row<kThreads>(at<const uint4>(p.table, token * (p.table_stride_bytes / 16)),
                     at<uint4>(p.out, row * (p.out_stride_bytes / 16)), int(p.row_bytes / 16));
}
SOFTGPU_KERNEL(embed)
