// vverify: selects the rows of V that changed most since the previous step (dLLM-Cache section 3.3). Launch:
// src/ops/vverify.rs.
//
// grid    (max_rows). A block compares one row.
// block   256 threads
// phases  1. each block: cosine of its fresh and its cached row            -> similarity, in the workspace
//         2. the last row of a sequence selects the floor(n * ratio) lowest and lists them in order
// shared  8 KiB of keys in phase 2, and 1 KiB for reductions
// bytes   2 * width * sizeof(element) per row, 3 with update_cached; the lists are negligible
// bound   memory bandwidth
//
// Sums are f32, over at most width / 256 elements per thread, then over a tree. A cosine is accurate to about 3e-7, so the
// order of rows whose cosines differ by less may differ from the reference.
#include "memory.cuh"
#include "reduce.cuh"
#include "select.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kSharedKeys = 1024;
constexpr float kEpsSquare = 1e-16f;  // minimum square of a vector: guards the division for zero vectors
static_assert(kThreads == kBuckets, "phase 2 selects with the whole block");

// Element of the workspace, an array with one element for each row or sequence, whichever are more. Counters are zero when a
// launch ends, at the same addresses for every shape, so that launches of all shapes can share a workspace.
struct Slot {
  uint32_t counter;  // of sequence i: its rows that have been compared
  float similarity;  // of row i; written before it is read
};

__device__ __forceinline__ int num_selected(const dllm_vverify_params& p, int rows) { return int(double(rows) * p.ratio); }

// A sequence: its rows first .. first + rows, and the number of rows selected in earlier sequences. Its end is clamped to
// first .. max_rows. So, for any cu_rows, no row has two sequences and no more rows are selected than exist.
struct Sequence {
  int index = -1, first = 0, rows = 0, selected_before = 0;

  __device__ __forceinline__ explicit Sequence(const dllm_vverify_params& p) { next(p); }

  __device__ __forceinline__ void next(const dllm_vverify_params& p) {
    selected_before += num_selected(p, rows);
    first += rows;
    index++;
    const int end = index < p.num_sequences ? at<const int32_t>(p.cu_rows)[index + 1] : 0;
    rows = max(first, min(end, p.max_rows)) - first;  // first is at most max_rows
  }
};

template <class T>
__device__ __forceinline__ float cosine(const T* fresh, T* cached, int width, bool update_cached) {
  constexpr int kUnroll = 2, kStep = kThreads * kVector<T>;  // two vectors of each row are in flight before a store
  float dot = 0.f, fresh_square = 0.f, cached_square = 0.f;
  for (int i = threadIdx.x * kVector<T>; i < width; i += kUnroll * kStep) {
    uint4 fresh_bits[kUnroll], cached_bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (i + u * kStep < width) {
        fresh_bits[u] = *reinterpret_cast<const uint4*>(fresh + i + u * kStep);
        cached_bits[u] = *reinterpret_cast<const uint4*>(cached + i + u * kStep);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (i + u * kStep >= width) break;
      if (update_cached) *reinterpret_cast<uint4*>(cached + i + u * kStep) = fresh_bits[u];
      const Vector<T> a = Vector<T>::unpack(fresh_bits[u]), b = Vector<T>::unpack(cached_bits[u]);
#pragma unroll
      for (int j = 0; j < kVector<T>; j++) {
        dot += a.x[j] * b.x[j];
        fresh_square += a.x[j] * a.x[j];
        cached_square += b.x[j] * b.x[j];
      }
    }
  }
  dot = block_reduce<kThreads>(dot, 0.f, Sum());
  fresh_square = fmaxf(block_reduce<kThreads>(fresh_square, 0.f, Sum()), kEpsSquare);
  cached_square = fmaxf(block_reduce<kThreads>(cached_square, 0.f, Sum()), kEpsSquare);
  // Dividing by the product of two roots would not always give 1 for equal rows, and rounding would select among them.
  const float cosine = dot / fresh_square * sqrtf(fresh_square / cached_square);
  return cosine == cosine ? cosine : -INFINITY;
}

// Keys of the rows of a sequence; the largest belong to the rows that changed most. The first kSharedKeys are in shared memory.
struct Keys {
  const Slot* slots;
  uint64_t* shared;
  int rows;

  // 0 - x, because -x would rank 0 and -0 differently.
  __device__ __forceinline__ uint64_t ranked_row(int i) const {
    return ranked(0.f - load_from_other_block(&slots[i].similarity), i);
  }
  __device__ __forceinline__ uint64_t operator[](int i) const { return rows <= kSharedKeys ? shared[i] : ranked_row(i); }
};

// Writes row `row` to element `slot` of the output lists.
__device__ __forceinline__ void append(const dllm_vverify_params& p, uint32_t slot, int row) {
  if (slot >= uint32_t(p.num_listed ? p.num_listed : p.max_rows)) {
    if (p.failed) *at<int32_t>(p.failed) = DLLM_INDEX_FAILED;
    return;
  }
  at<int32_t>(p.indices)[slot] = row;
#pragma unroll
  for (int k = 0; k < 3; k++) {
    if (p.tables[k]) at<int32_t>(p.selected[k])[slot] = at<const int32_t>(p.tables[k])[row];
  }
}

// Phase 2, the whole block: lists the rows of a sequence with the `count` lowest similarities, in order.
__device__ void select(const dllm_vverify_params& p, const Slot* slots, const Sequence& sequence, int count) {
  __shared__ uint64_t shared_keys[kSharedKeys];
  __shared__ int warp_total[kThreads / kWarp];
  const int rows = sequence.rows;
  const Keys keys{slots + sequence.first, shared_keys, rows};
  for (int i = threadIdx.x; i < min(rows, kSharedKeys); i += kThreads) shared_keys[i] = keys.ranked_row(i);
  __syncthreads();
  const uint64_t bound = kth_largest(keys, rows, count);

  const int first_selected =
      p.first_selected ? at<const int32_t>(p.first_selected)[sequence.index] : sequence.selected_before;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int written = 0;
  for (int tile = 0; tile < rows; tile += kThreads) {
    const int i = tile + threadIdx.x;
    const bool selected = i < rows && keys[i] >= bound;
    const uint32_t lanes = __ballot_sync(kAllLanes, selected);
    __syncthreads();  // the totals of the previous tile have been read
    if (lane == 0) warp_total[warp] = __popc(lanes);
    __syncthreads();
    int before = written + __popc(lanes & ((1u << lane) - 1));
    for (int w = 0; w < kThreads / kWarp; w++) {
      if (w < warp) before += warp_total[w];
      written += warp_total[w];
    }
    // Unsigned, so that a sum below 0 or above INT_MAX is out of range.
    if (selected) append(p, uint32_t(first_selected) + uint32_t(before), sequence.first + i);
  }
}

template <class T>
__device__ __forceinline__ void vverify(const dllm_vverify_params& p) {
  const int row = blockIdx.x;
  if (row == 0 && threadIdx.x == 0) {
    int32_t* cu_selected = at<int32_t>(p.cu_selected);
    Sequence s(p);
    for (; s.index < p.num_sequences; s.next(p)) cu_selected[s.index] = s.selected_before;
    cu_selected[p.num_sequences] = s.selected_before;
  }
  Sequence sequence(p);
  while (sequence.index < p.num_sequences && row >= sequence.first + sequence.rows) sequence.next(p);
  if (sequence.index == p.num_sequences) return;

  Slot* slots = at<Slot>(p.workspace);
  const int fresh_row = p.fresh_row ? at<const int32_t>(p.fresh_row)[row] : row;
  const int cached_row = p.cached_row ? at<const int32_t>(p.cached_row)[row] : row;
  float similarity = -INFINITY;
  const int num_fresh_rows = p.fresh_row ? p.num_fresh_rows : p.max_rows;
  if (fresh_row >= 0 && fresh_row < num_fresh_rows && cached_row >= 0 && cached_row < p.num_cached_rows) {
    similarity = cosine(at<const T>(p.fresh, fresh_row * p.fresh_stride),
                        at<T>(p.cached, cached_row * p.cached_stride), p.width, p.update_cached);
  } else if (p.failed && threadIdx.x == 0) {
    *at<int32_t>(p.failed) = DLLM_INDEX_FAILED;
  }
  if (threadIdx.x == 0) {
    slots[row].similarity = similarity;
    if (p.similarity) at<float>(p.similarity)[row] = similarity;
  }
  if (!is_last(&slots[sequence.index].counter, sequence.rows)) return;
  const int count = num_selected(p, sequence.rows);
  if (count > 0) select(p, slots, sequence, count);
}

}  // namespace

#define VVERIFY(name, T)                                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads, 4) name(DLLM_PARAMS dllm_vverify_params p) { vverify<T>(p); } \
  SOFTGPU_KERNEL(name)

VVERIFY(vverify_bf16, __nv_bfloat16)
VVERIFY(vverify_f16, __half)
