// attention: bidirectional softmax(scale q k^T) v over keys in up to three segments, read where they are; FlashAttention-2's
// schedule with split-KV. src/ops/attention.rs.
//
// grid    (query tiles, kv heads, num_sequences * splits). The query rows of a sequence and the heads of a group are
//         packed: packed row r is head r % group of query row r / group. A block owns kWarps * 16 packed rows of one kv head and
//         one split of the key tiles they visit.
// block   kWarps warps; each owns 16 packed rows from the first product to the last
// shared  two buffers for keys and two for values, 64 rows of head_dim each: 64 KiB at head_dim 128; rows are swizzled by 16
//         bytes, so that ldmatrix reads eight rows without bank conflicts. The queries pass through the first of them.
// loop    copy(k[i + 1]) | s = q k[i]^T | softmax | copy(v[i + 1]) | o += p v[i]; a copy is waited for one product later
// bytes   2 * keys * head_dim * sizeof(element) a kv head and sequence; queries, outputs and partial results are small
// bound   streaming (32 rows, long keys): memory bandwidth, 32 FLOP a byte without groups. Full: mma rate.
//
// Rows past the end are not read: their copies fill zeros, and their scores are minus infinity. The running maximum starts
// finite, so that no difference of infinities appears. Splits leave (o, lse) in the workspace; attention_combine merges
// them in order.
#include "memory.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

namespace {

constexpr int kKeys = DLLM_KEY_TILE;
constexpr float kLog2e = 1.4426950408889634f;

// Numbers in device memory may be anything: brought to within before they are used.
__device__ __forceinline__ int within(int x, int least, int most) { return max(least, min(x, most)); }

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16_bf16(d, a, b);
}
template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16_f16(d, a, b);
}

// Two neighbours in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

// Where 16 bytes of a row lie in a tile of shared memory: eight rows that ldmatrix reads together fall into eight
// different groups of four banks.
template <int D>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  const int swizzle = D == 32 ? row >> 1 & 3 : row & 7;
  return row * D * 2 + (chunk ^ swizzle) * 16;
}

// The part of a segment that holds a sequence's keys.
struct Part {
  int end;        // keys of this sequence up to here
  int64_t first;  // key j lies in row first + j of the segment

  __device__ Part(const dllm_segment& segment, int sequence, int before) {
    int start = 0, len = 0;
    if (segment.k) {
      if (segment.start) start = within(at<const int32_t>(segment.start)[sequence], 0, segment.num_rows);
      len = within(at<const int32_t>(segment.len)[sequence], 0, segment.num_rows - start);
    }
    first = int64_t(start) - before;
    end = before + min(len, (1 << 30) - before);  // more keys than that are not read
  }
};

// The keys of one sequence: rows of three segments, one after the other.
struct Keys {
  Part a, b, c;
  __device__ Keys(const dllm_attention_params& p, int sequence)
      : a(p.segments[0], sequence, 0), b(p.segments[1], sequence, a.end), c(p.segments[2], sequence, b.end) {}
  __device__ __forceinline__ int count() const { return c.end; }
};

// Copies tile `tile` of the keys (or values) of a kv head into shared memory. Every thread copies 16 bytes of every
// kRows-th row. Which segment a row is in is chosen without branches and without arrays, which would lie in local memory.
template <class T, int D, int kThreads>
__device__ __forceinline__ void copy_tile(const dllm_attention_params& p, const Keys& keys, bool values, int head, int tile,
                                          unsigned char* to) {
  constexpr int kChunks = D / 8, kRows = kThreads / kChunks;
  const int chunk = threadIdx.x % kChunks;
  const dllm_segment& a = p.segments[0];
  const dllm_segment& b = p.segments[1];
  const dllm_segment& c = p.segments[2];
#pragma unroll
  for (int row = threadIdx.x / kChunks; row < kKeys; row += kRows) {
    const int64_t key = int64_t(tile) * kKeys + row;
    const bool inside = tile >= 0 && key < keys.count(), in_a = key < keys.a.end, in_b = key < keys.b.end;
    const uint64_t base = values ? in_a ? a.v : in_b ? b.v : c.v : in_a ? a.k : in_b ? b.k : c.k;
    const int64_t stride = values ? in_a ? a.v_stride : in_b ? b.v_stride : c.v_stride
                                  : in_a ? a.k_stride : in_b ? b.k_stride : c.k_stride;
    const int64_t first = in_a ? keys.a.first : in_b ? keys.b.first : keys.c.first;
    const int64_t from_row = inside ? first + key : 0;  // a tile that is not there may have any number
    const T* from = at<const T>(base, from_row * stride + head * D + chunk * 8);
    cp_async_16(to + tile_offset<D>(row, chunk), inside ? from : at<const T>(p.q), inside ? 16 : 0);
  }
}

// The key tiles that a block visits: `count` of them, the i-th being list[i], or i without a list.
struct Visits {
  const int32_t* list;
  int begin, end;

  __device__ Visits(const dllm_attention_params& p, int sequence, int head, int query_tile, int num_keys, int split, int splits) {
    list = nullptr;
    int count = (num_keys + kKeys - 1) / kKeys;
    if (p.tile_offsets) {
      const int64_t heads = p.per_head ? p.num_kv_heads : 1;
      const int64_t index = (int64_t(sequence) * p.query_tiles + query_tile) * heads + (p.per_head ? head : 0);
      const int32_t* offsets = at<const int32_t>(p.tile_offsets) + index;
      const int first = within(offsets[0], 0, p.num_tile_indices);
      count = within(offsets[1], first, p.num_tile_indices) - first;
      list = at<const int32_t>(p.tile_indices) + first;
    }
    const int share = (count + splits - 1) / splits;
    begin = min(count, split * share);
    end = min(count, begin + share);
  }

  __device__ __forceinline__ int tile(int i) const { return list ? list[i] : i; }
};

// The running result of a warp's 16 rows. Of a row, lane 4 * (row % 8) + j holds columns 8 n + 2 j and the next.
template <int D>
struct Running {
  float out[D / 8][4];
  float max[2], sum[2];  // of the unscaled scores, rows lane / 4 and lane / 4 + 8; sums of this lane's columns only

  __device__ Running() {
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) out[n][j] = 0.f;
    }
    max[0] = max[1] = -FLT_MAX;
    sum[0] = sum[1] = 0.f;
  }

  // Turns scores into weights under the new maximum, and brings what was summed so far under it.
  __device__ __forceinline__ void soften(float (&scores)[kKeys / 8][4], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = max[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float shrink = ex2_approx((max[half] - top) * scale_log2);
      // Nothing yet: with a scale above 0.69 the product would be minus infinity, and its difference no number.
      const float offset = top == -FLT_MAX ? 0.f : top * scale_log2;
      max[half] = top;
      float added = 0.f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; j++) {
          scores[n][j] = ex2_approx(scores[n][j] * scale_log2 - offset);
          added += scores[n][j];
        }
      }
      sum[half] = sum[half] * shrink + added;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        out[n][2 * half] *= shrink;
        out[n][2 * half + 1] *= shrink;
      }
    }
  }

  // Divides by the sums of the whole rows; returns each row's natural log-sum-exp. What is not a number stays so.
  __device__ __forceinline__ float2 finish(float scale) {
    float lse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float total = sum[half];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      lse[half] = total == 0.f ? -INFINITY : max[half] * scale + logf(total);
      const float inverse = total == 0.f ? 0.f : 1.f / total;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        out[n][2 * half] *= inverse;
        out[n][2 * half + 1] *= inverse;
      }
    }
    return make_float2(lse[0], lse[1]);
  }
};

template <class T, int D, int kWarps>
__device__ __forceinline__ void attention(const dllm_attention_params& p) {
  constexpr int kThreads = kWarps * kWarp, kRows = kWarps * 16, kSteps = D / 16, kTileBytes = kKeys * D * 2;
  DYNAMIC_SHARED(shared);
  unsigned char* const key_buffer = shared;
  unsigned char* const value_buffer = shared + 2 * kTileBytes;

  const int splits = p.max_splits, head = blockIdx.y;
  const int sequence = blockIdx.z / splits, split = blockIdx.z % splits;
  const int group = p.num_heads / p.num_kv_heads;
  const int32_t* cu_rows = at<const int32_t>(p.cu_rows);
  const int first_row = within(cu_rows[sequence], 0, p.max_rows);
  const int rows = within(cu_rows[sequence + 1], first_row, p.max_rows) - first_row;
  const int first_packed = blockIdx.x * kRows;
  if (first_packed >= rows * group) return;

  const Keys keys(p, sequence);
  const Visits visits(p, sequence, head, first_packed / (DLLM_QUERY_TILE * group), keys.count(), split, splits);

  // Queries: through shared memory into the registers that mma reads.
  const T* queries = at<const T>(p.q, first_row * p.q_stride);
  for (int i = threadIdx.x; i < kRows * (D / 8); i += kThreads) {
    const int row = i / (D / 8), chunk = i % (D / 8), r = first_packed + row;
    const bool inside = r < rows * group;
    const T* from = queries + r / group * p.q_stride + (head * group + r % group) * D + chunk * 8;
    cp_async_16(shared + tile_offset<D>(row, chunk), inside ? from : queries, inside ? 16 : 0);
  }
  cp_async_wait_all();
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t query[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    ldmatrix_x4(query[step], shared + tile_offset<D>(warp * 16 + lane % 16, step * 2 + lane / 16));
    // The maximum is taken before scaling, so the sign of the scale goes to the queries.
#pragma unroll
    for (int j = 0; j < 4; j++) query[step][j] ^= p.scale < 0.f ? 0x80008000u : 0u;
  }
  __syncthreads();

  const float scale = fabsf(p.scale);
  const float scale_log2 = fmaxf(scale * kLog2e, FLT_MIN);  // 0 times minus infinity would not be a number
  Running<D> running;
  const auto copy = [&](bool values, int i) {
    unsigned char* to = (values ? value_buffer : key_buffer) + (i - visits.begin) % 2 * kTileBytes;
    if (i < visits.end) copy_tile<T, D, kThreads>(p, keys, values, head, visits.tile(i), to);
    cp_async_commit_group();  // empty at the end: so that the count of groups under way stays the same
  };
  copy(false, visits.begin);
  copy(true, visits.begin);
  for (int i = visits.begin; i < visits.end; i++) {
    const unsigned char* tile_keys = key_buffer + (i - visits.begin) % 2 * kTileBytes;
    const unsigned char* tile_values = value_buffer + (i - visits.begin) % 2 * kTileBytes;

    cp_async_wait_group<1>();  // the keys are there, the values may be under way
    __syncthreads();           // for all threads; and nobody reads the other buffer of keys any more
    copy(false, i + 1);
    float scores[kKeys / 8][4];
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) scores[n][j] = 0.f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; n += 2) {
        uint32_t key[4];  // two blocks of eight keys
        ldmatrix_x4(key, tile_keys + tile_offset<D>(n * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
        mma<T>(scores[n], query[step], {key[0], key[1]});
        mma<T>(scores[n + 1], query[step], {key[2], key[3]});
      }
    }
    const int64_t left = keys.count() - int64_t(visits.tile(i)) * kKeys;
    if (left < kKeys || visits.tile(i) < 0) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (visits.tile(i) < 0 || n * 8 + lane % 4 * 2 + j % 2 >= left) scores[n][j] = -INFINITY;
        }
      }
    }
    running.soften(scores, scale_log2);

    cp_async_wait_group<1>();  // the values are there, the next keys may be under way
    __syncthreads();
    copy(true, i + 1);
#pragma unroll
    for (int step = 0; step < kKeys / 16; step++) {
      const uint32_t weights[4] = {
          packed<T>(scores[2 * step][0], scores[2 * step][1]), packed<T>(scores[2 * step][2], scores[2 * step][3]),
          packed<T>(scores[2 * step + 1][0], scores[2 * step + 1][1]), packed<T>(scores[2 * step + 1][2], scores[2 * step + 1][3])};
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        uint32_t value[4];  // two blocks of eight columns
        ldmatrix_x4_trans(value, tile_values + tile_offset<D>(step * 16 + lane % 16, n + lane / 16));
        mma<T>(running.out[n], weights, {value[0], value[1]});
        mma<T>(running.out[n + 1], weights, {value[2], value[3]});
      }
    }
  }
  cp_async_wait_all();  // the empty groups

  const float2 lse = running.finish(scale);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = first_packed + warp * 16 + lane / 4 + half * 8;
    if (r >= rows * group) continue;
    const int64_t row = first_row + r / group;
    const int column = head * group + r % group;
    const float row_lse = half ? lse.y : lse.x;
    if (splits == 1) {
      T* out = at<T>(p.out, row * p.out_stride + column * D);
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        const uint32_t bits = packed<T>(running.out[n][2 * half], running.out[n][2 * half + 1]);
        *reinterpret_cast<uint32_t*>(out + n * 8 + lane % 4 * 2) = bits;
      }
      if (p.lse && lane % 4 == 0) at<float>(p.lse)[row * p.num_heads + column] = row_lse;
    } else {
      // Workspace: [splits, max_rows, num_heads] log-sum-exps, then as many rows of head_dim.
      const int64_t rows_of_all = int64_t(p.max_rows) * p.num_heads;
      const int64_t place = split * rows_of_all + row * p.num_heads + column;
      float* out = at<float>(p.workspace, (splits * rows_of_all + 3) / 4 * 4 + place * D);
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        *reinterpret_cast<float2*>(out + n * 8 + lane % 4 * 2) = make_float2(running.out[n][2 * half], running.out[n][2 * half + 1]);
      }
      if (lane % 4 == 0) at<float>(p.workspace)[place] = row_lse;
    }
  }
}

// attention_combine: one warp for each query row and head; parts in order, so that the bits do not change.
//
// grid    (rows * num_heads / 8, rounded up), block 256 threads
template <class T>
__device__ __forceinline__ void combine(const dllm_attention_params& p) {
  const int row_head = blockIdx.x * (256 / kWarp) + threadIdx.x / kWarp;  // max_rows * num_heads is checked to fit
  const int rows = within(at<const int32_t>(p.cu_rows)[p.num_sequences], 0, p.max_rows);
  if (row_head >= rows * p.num_heads) return;
  const int64_t rows_of_all = int64_t(p.max_rows) * p.num_heads;
  const float* lse = at<const float>(p.workspace) + row_head;
  const float* parts = at<const float>(p.workspace, (p.max_splits * rows_of_all + 3) / 4 * 4);

  float top = -FLT_MAX;
  for (int s = 0; s < p.max_splits; s++) top = fmaxf(top, lse[s * rows_of_all]);
  float total = 0.f;
  for (int s = 0; s < p.max_splits; s++) total += ex2_approx((lse[s * rows_of_all] - top) * kLog2e);

  const int lane = threadIdx.x % kWarp;
  const float inverse = total == 0.f ? 0.f : 1.f / total;
  T* out = at<T>(p.out, int64_t(row_head / p.num_heads) * p.out_stride + row_head % p.num_heads * p.head_dim);
  for (int column = lane * 2; column < p.head_dim; column += kWarp * 2) {
    float2 sum = make_float2(0.f, 0.f);
    for (int s = 0; s < p.max_splits; s++) {
      const float weight = ex2_approx((lse[s * rows_of_all] - top) * kLog2e) * inverse;
      if (weight == 0.f) continue;  // splits without keys
      const float2 part = *reinterpret_cast<const float2*>(parts + (s * rows_of_all + row_head) * p.head_dim + column);
      sum.x += weight * part.x;
      sum.y += weight * part.y;
    }
    *reinterpret_cast<uint32_t*>(out + column) = packed<T>(sum.x, sum.y);
  }
  if (p.lse && lane == 0) at<float>(p.lse)[row_head] = total == 0.f ? -INFINITY : top + logf(total);
}

}  // namespace

#define ATTENTION(name, T, D, warps)                                                                             \
  extern "C" __global__ void __launch_bounds__(warps * 32) name(DLLM_PARAMS dllm_attention_params p) {           \
    attention<T, D, warps>(p);                                                                                   \
  }                                                                                                              \
  SOFTGPU_KERNEL(name)

ATTENTION(attention_bf16_32_w2, __nv_bfloat16, 32, 2)
ATTENTION(attention_bf16_64_w2, __nv_bfloat16, 64, 2)
ATTENTION(attention_bf16_128_w2, __nv_bfloat16, 128, 2)
ATTENTION(attention_f16_32_w2, __half, 32, 2)
ATTENTION(attention_f16_64_w2, __half, 64, 2)
ATTENTION(attention_f16_128_w2, __half, 128, 2)
ATTENTION(attention_bf16_32_w8, __nv_bfloat16, 32, 8)
ATTENTION(attention_bf16_64_w8, __nv_bfloat16, 64, 8)
ATTENTION(attention_bf16_128_w8, __nv_bfloat16, 128, 8)
ATTENTION(attention_f16_32_w8, __half, 32, 8)
ATTENTION(attention_f16_64_w8, __half, 64, 8)
ATTENTION(attention_f16_128_w8, __half, 128, 8)

#define COMBINE(name, T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) name(DLLM_PARAMS dllm_attention_params p) { combine<T>(p); }     \
  SOFTGPU_KERNEL(name)

COMBINE(attention_combine_bf16, __nv_bfloat16)
COMBINE(attention_combine_f16, __half)
