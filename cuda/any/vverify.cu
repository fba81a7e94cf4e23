// vverify: which rows of V turned most since the previous step (dLLM-Cache section 3.3); src/ops/vverify.rs.
//
// grid    (max_rows). A block compares one row.
// block   256 threads
// phases  1. each block: cosine of its fresh and its cached row            -> similarity, in the workspace
//         2. the last row of a sequence selects the floor(n * ratio) lowest and writes their indices in order
// shared  8 KiB of keys for phase 2, and the reductions' few hundred bytes
// bytes   2 * width * sizeof(element) a row, 3 with update_cached
// bound   by memory bandwidth
//
// Sums are f32 over at most width / 256 elements a thread, then over a tree: a cosine is good to about 3e-7, so rows that
// turned less than that from each other may change places with the oracle's.
#include "memory.cuh"
#include "reduce.cuh"
#include "select.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kSharedKeys = 1024;
constexpr float kEps = 1e-8f;  // guards the division for zero vectors
static_assert(kThreads == kBuckets, "phase 2 selects with the whole block");

struct Workspace {
  uint32_t* sequence_counter;  // [num_sequences]; the rest is written before it is read
  float* similarity;           // [max_rows]
  uint64_t* keys;              // [max_rows], for sequences of more rows than shared memory has room for

  __device__ explicit Workspace(const dllm_vverify_params& p) {
    sequence_counter = at<uint32_t>(p.workspace);
    similarity = at<float>(p.workspace) + p.num_sequences;
    keys = at<uint64_t>(p.workspace) + (int64_t(p.num_sequences) + p.max_rows + 1) / 2;
  }
};

__device__ __forceinline__ int num_selected(const dllm_vverify_params& p, int rows) {
  return rows > 0 ? max(0, min(int(double(rows) * p.ratio), rows)) : 0;
}

// Where the selected rows of a sequence begin.
__device__ __forceinline__ int first_selected(const dllm_vverify_params& p, const int32_t* cu_rows, int sequence) {
  int first = 0;
  for (int s = 0; s < sequence; s++) first += num_selected(p, cu_rows[s + 1] - cu_rows[s]);
  return first;
}

// The sequence that owns a row, -1 if none does; the same in all threads.
__device__ __forceinline__ int sequence_of(const dllm_vverify_params& p, const int32_t* cu_rows, int row) {
  __shared__ int sequence;
  if (threadIdx.x == 0) sequence = -1;
  __syncthreads();
  for (int s = threadIdx.x; s < p.num_sequences; s += kThreads) {
    if (cu_rows[s] <= row && row < cu_rows[s + 1]) sequence = s;
  }
  __syncthreads();
  return sequence;
}

template <class T>
__device__ __forceinline__ float cosine(const T* fresh, T* cached, int width, bool update_cached) {
  float dot = 0.f, fresh_square = 0.f, cached_square = 0.f;
  for (int i = threadIdx.x * kVector<T>; i < width; i += kThreads * kVector<T>) {
    const uint4 bits = *reinterpret_cast<const uint4*>(fresh + i);
    const Vector<T> a = Vector<T>::unpack(bits), b = Vector<T>::load(cached + i);
    if (update_cached) *reinterpret_cast<uint4*>(cached + i) = bits;
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) {
      dot += a.x[j] * b.x[j];
      fresh_square += a.x[j] * a.x[j];
      cached_square += b.x[j] * b.x[j];
    }
  }
  dot = block_reduce<kThreads>(dot, 0.f, Sum());
  fresh_square = block_reduce<kThreads>(fresh_square, 0.f, Sum());
  cached_square = block_reduce<kThreads>(cached_square, 0.f, Sum());
  const float cosine = dot / (fmaxf(sqrtf(fresh_square), kEps) * fmaxf(sqrtf(cached_square), kEps));
  return cosine == cosine ? cosine : -INFINITY;
}

// Phase 2, the whole block: of the rows first .. first + rows, those with the `count` lowest similarities, in order.
__device__ void select(const dllm_vverify_params& p, const Workspace& workspace, int first, int rows, int count, int32_t* indices) {
  __shared__ uint64_t shared_keys[kSharedKeys];
  __shared__ int warp_total[kThreads / kWarp];
  uint64_t* keys = rows <= kSharedKeys ? shared_keys : workspace.keys + first;
  for (int i = threadIdx.x; i < rows; i += kThreads) keys[i] = ranked(-load_shared_by_blocks(workspace.similarity + first + i), i);
  __syncthreads();
  const uint64_t bound = kth_largest(keys, rows, count);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int written = 0;
  for (int tile = 0; tile < rows; tile += kThreads) {
    const int i = tile + threadIdx.x;
    const bool selected = i < rows && keys[i] >= bound;
    const uint32_t lanes = __ballot_sync(kAllLanes, selected);
    __syncthreads();  // the totals of the tile before have been read
    if (lane == 0) warp_total[warp] = __popc(lanes);
    __syncthreads();
    int before = written + __popc(lanes & ((1u << lane) - 1));
    for (int w = 0; w < kThreads / kWarp; w++) {
      if (w < warp) before += warp_total[w];
      written += warp_total[w];
    }
    if (selected) indices[before] = first + i;
  }
}

template <class T>
__device__ __forceinline__ void vverify(const dllm_vverify_params& p) {
  const int32_t* cu_rows = at<const int32_t>(p.cu_rows);
  const int row = blockIdx.x;
  if (row == 0) {
    for (int s = threadIdx.x; s <= p.num_sequences; s += kThreads) {
      at<int32_t>(p.cu_selected)[s] = first_selected(p, cu_rows, s);
    }
  }
  if (row >= cu_rows[p.num_sequences]) return;
  const int sequence = sequence_of(p, cu_rows, row);
  if (sequence < 0) return;
  const int first = max(0, cu_rows[sequence]);
  const int rows = min(cu_rows[sequence + 1], p.max_rows) - first;

  const Workspace workspace(p);
  const int cached_row = p.cached_row ? at<const int32_t>(p.cached_row)[row] : row;
  float similarity = -INFINITY;
  if (cached_row >= 0 && cached_row < p.num_cached_rows) {
    similarity = cosine(at<const T>(p.fresh, row * p.fresh_stride), at<T>(p.cached, cached_row * p.cached_stride), p.width,
                        p.update_cached);
  } else if (p.failed && threadIdx.x == 0) {
    *at<int32_t>(p.failed) = DLLM_INDEX_FAILED;
  }
  if (threadIdx.x == 0) {
    workspace.similarity[row] = similarity;
    if (p.similarity) at<float>(p.similarity)[row] = similarity;
  }
  if (!is_last(workspace.sequence_counter + sequence, rows)) return;
  const int count = num_selected(p, rows);
  int32_t* indices = at<int32_t>(p.indices) + first_selected(p, cu_rows, sequence);
  if (count > 0) select(p, workspace, first, rows, count, indices);
}

}  // namespace

#define VVERIFY(name, T)                                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads, 4) name(DLLM_PARAMS dllm_vverify_params p) { vverify<T>(p); } \
  SOFTGPU_KERNEL(name)

VVERIFY(vverify_bf16, __nv_bfloat16)
VVERIFY(vverify_f16, __half)
