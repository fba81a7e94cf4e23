// attention: bidirectional softmax(scale q k^T) v over keys in up to three segments, read in place; FlashAttention-2's
// schedule with split-KV. Launch: src/ops/attention.rs.
//
// grid    (query tiles, kv heads, num_sequences * splits). The query rows of a sequence and the heads of a group are packed:
//         packed row r is head r % group of query row r / group. A block owns kWarps * 16 packed rows of one kv head and one
//         split of the key tiles that they visit.
// block   kWarps warps; each owns 16 packed rows from the first product to the last
// shared  two buffers for keys and two for values, 64 rows of head_dim each: 64 KiB at head_dim 128. Rows are swizzled by 16
//         bytes, so that ldmatrix reads eight rows without bank conflicts. Queries are loaded through the value buffers.
// loop    copy(k[i + 1], v[i + 1]) | s = q k[i]^T | softmax | o += p v[i]; the first product waits for the keys, the second for
//         the values
// bytes   2 * keys * head_dim * sizeof(element) per kv head and sequence; queries, outputs and partial results are small
// bound   streaming form (32 rows, long keys): memory bandwidth, 32 FLOP per byte without groups. Full form: mma rate.
//
// Rows past the end are not read: their copies fill zeros, and their scores are minus infinity. The running maximum starts
// finite, so that no difference of infinities occurs. Splits store (o, lse) in the workspace; attention_combine merges them in
// order.
#include "memory.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

namespace {

constexpr int kKeys = DLLM_KEY_TILE;
constexpr int kMaxKeys = 1 << 30;  // of a sequence; further keys are not read
constexpr float kLog2e = 1.4426950408889634f;

// Values in device memory are not trusted: each is clamped before use.
__device__ __forceinline__ int clamped(int x, int low, int high) { return max(low, min(x, high)); }

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

// Two neighbouring elements in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

// Byte offset of a chunk of 16 bytes of a row in a tile of shared memory. The swizzle places the eight rows that ldmatrix
// reads together in eight different groups of four banks. Row + 8 is at offset + 16 * D, chunk ^ c at offset ^ 16 * c.
template <int D>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  const int swizzle = D == 32 ? row >> 1 & 3 : row & 7;
  return row * D * 2 + (chunk ^ swizzle) * 16;
}

// Part of a segment that holds keys of one sequence.
struct SegmentPart {
  int end;    // keys of the sequence in this and earlier segments
  int first;  // key j is row first + j of the segment

  __device__ SegmentPart(const dllm_segment& segment, int sequence, int before) {
    int start = 0, len = 0;
    if (segment.k) {
      if (segment.start) start = clamped(at<const int32_t>(segment.start)[sequence], 0, segment.num_rows);
      len = clamped(at<const int32_t>(segment.len)[sequence], 0, segment.num_rows - start);
    }
    first = start - before;
    end = before + min(len, kMaxKeys - before);
  }
};

// Keys of one sequence: rows of three segments, in order.
struct Keys {
  SegmentPart a, b, c;
  __device__ Keys(const dllm_attention_params& p, int sequence)
      : a(p.segments[0], sequence, 0), b(p.segments[1], sequence, a.end), c(p.segments[2], sequence, b.end) {}
  __device__ __forceinline__ int count() const { return c.end; }
};

// Location of the keys (or values) in the segment that holds key `key` of the sequence.
struct Source {
  uint64_t base;
  int64_t stride;
  int first, end;

  // Selected without branches, and without arrays, which would be placed in local memory.
  __device__ __forceinline__ Source(const dllm_attention_params& p, const Keys& keys, bool values, int key) {
    const dllm_segment& a = p.segments[0];
    const dllm_segment& b = p.segments[1];
    const dllm_segment& c = p.segments[2];
    const bool in_a = key < keys.a.end, in_b = key < keys.b.end;
    base = values ? in_a ? a.v : in_b ? b.v : c.v : in_a ? a.k : in_b ? b.k : c.k;
    stride = values ? in_a ? a.v_stride : in_b ? b.v_stride : c.v_stride
                    : in_a ? a.k_stride : in_b ? b.k_stride : c.k_stride;
    first = in_a ? keys.a.first : in_b ? keys.b.first : keys.c.first;
    end = in_a ? keys.a.end : in_b ? keys.b.end : keys.c.end;
  }
};

// Copies tile `tile` of the keys (or values) of a kv head to shared memory. Every thread copies 16 bytes of every kRows-th
// row. Most tiles are within one segment, where these rows have a constant distance. In other tiles each row is looked up, in
// a loop that is not unrolled because it is rare.
template <class T, int D, int kThreads>
__device__ __forceinline__ void copy_tile(const dllm_attention_params& p, const Keys& keys, bool values, int head, int tile,
                                          unsigned char* to) {
  constexpr int kChunks = D / 8, kRows = kThreads / kChunks;
  static_assert(kRows % 4 == 0, "every second row of a thread has the same swizzle");
  const int first_row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const int key = tile * kKeys;
  const Source source(p, keys, values, key);
  if (key + kKeys <= source.end) {
    const T* from = at<const T>(source.base, (source.first + key + first_row) * source.stride + head * D + chunk * 8);
    unsigned char* const even = to + tile_offset<D>(first_row, chunk);
    unsigned char* const odd = to + tile_offset<D>(first_row + kRows, chunk);
#pragma unroll
    for (int i = 0; i < kKeys / kRows; i++) {
      cp_async_16((i % 2 ? odd : even) + i / 2 * 2 * kRows * D * 2, from);
      from += kRows * source.stride;
    }
    return;
  }
#pragma unroll 1
  for (int row = first_row; row < kKeys; row += kRows) {
    const bool inside = key + row < keys.count();
    const Source source(p, keys, values, key + row);
    const int from_row = inside ? source.first + key + row : 0;
    const T* from = at<const T>(source.base, from_row * source.stride + head * D + chunk * 8);
    cp_async_16(to + tile_offset<D>(row, chunk), inside ? from : at<const T>(p.q), inside ? 16 : 0);
  }
}

// Key tiles that a block visits: the i-th is list[i], or i without a list. Lists are not trusted: a number that is no tile
// becomes a tile without keys.
struct TileVisits {
  const int32_t* list;
  int begin, end;

  __device__ TileVisits(const dllm_attention_params& p, int sequence, int head, int query_tile, int num_keys, int split,
                        int splits) {
    list = nullptr;
    int count = (num_keys + kKeys - 1) / kKeys;
    if (p.tile_offsets) {
      const int64_t heads = p.per_head ? p.num_kv_heads : 1;
      const int64_t index = (int64_t(sequence) * p.query_tiles + query_tile) * heads + (p.per_head ? head : 0);
      const int32_t* offsets = at<const int32_t>(p.tile_offsets) + index;
      const int first = clamped(offsets[0], 0, p.num_tile_indices);
      count = clamped(offsets[1], first, p.num_tile_indices) - first;
      list = at<const int32_t>(p.tile_indices) + first;
    }
    const int share = (count + splits - 1) / splits;
    begin = min(count, split * share);
    end = min(count, begin + share);
  }

  __device__ __forceinline__ int tile(int i) const {
    return list && i < end ? int(min(uint32_t(list[i]), uint32_t(kMaxKeys / kKeys))) : i;
  }
};

// Online softmax of a warp's 16 rows. Lane 4 * (row % 8) + j holds columns 8 n + 2 j and the next of a row.
template <int D>
struct OnlineSoftmax {
  float out[D / 8][4];
  float max[2], sum[2];  // of rows lane / 4 and lane / 4 + 8: maxima of unscaled scores, sums over this lane's columns

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) out[n][j] = 0.f;
    }
    max[0] = max[1] = -FLT_MAX;
    sum[0] = sum[1] = 0.f;
  }

  // Replaces scores by weights relative to the new maximum, and rescales the sums and outputs so far.
  __device__ __forceinline__ void update(float (&scores)[kKeys / 8][4], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = max[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float shrink = ex2_approx((max[half] - top) * scale_log2);
      // No keys yet: with a scale above 0.69 the product would be minus infinity, and the difference NaN.
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

  // Divides by the sums of the whole rows and returns the natural log-sum-exp of each. NaN is preserved.
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
  const int first_row = clamped(cu_rows[sequence], 0, p.max_rows);
  const int rows = clamped(cu_rows[sequence + 1], first_row, p.max_rows) - first_row;
  const int first_packed = blockIdx.x * kRows;
  const Keys keys(p, sequence);  // before the check for rows, so that no load waits for another
  if (first_packed >= rows * group) return;
  const TileVisits visits(p, sequence, head, first_packed / (DLLM_QUERY_TILE * group), keys.count(), split, splits);

  const auto copy = [&](bool values, int i, int tile) {
    unsigned char* to = (values ? value_buffer : key_buffer) + (i - visits.begin) % 2 * kTileBytes;
    if (i < visits.end) copy_tile<T, D, kThreads>(p, keys, values, head, tile, to);
    cp_async_commit_group();  // empty at the end, so that the number of groups in flight stays the same
  };
  int tile = visits.tile(visits.begin), next_tile = visits.tile(visits.begin + 1);

  // Queries go through shared memory to the registers that mma reads. They use the end of the value buffers, so that the first
  // keys, and the first values if there is room, are in flight with them.
  constexpr bool kRoomForValues = kRows <= kKeys;
  unsigned char* const query_buffer = value_buffer + 2 * kTileBytes - kRows * D * 2;
  const T* queries = at<const T>(p.q, first_row * p.q_stride);
  for (int i = threadIdx.x; i < kRows * (D / 8); i += kThreads) {
    const int row = i / (D / 8), chunk = i % (D / 8), r = first_packed + row;
    const bool inside = r < rows * group;
    const T* from = queries + r / group * p.q_stride + (head * group + r % group) * D + chunk * 8;
    cp_async_16(query_buffer + tile_offset<D>(row, chunk), inside ? from : queries, inside ? 16 : 0);
  }
  cp_async_commit_group();
  copy(false, visits.begin, tile);
  if (kRoomForValues) copy(true, visits.begin, tile);
  cp_async_wait_group<kRoomForValues ? 2 : 1>();  // the queries have arrived
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t query[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    ldmatrix_x4(query[step], query_buffer + tile_offset<D>(warp * 16 + lane % 16, step * 2 + lane / 16));
    // The maximum is computed before scaling, so the sign of the scale is applied to the queries.
#pragma unroll
    for (int j = 0; j < 4; j++) query[step][j] ^= p.scale < 0.f ? 0x80008000u : 0u;
  }
  if (!kRoomForValues) {
    __syncthreads();  // all threads have read their queries
    copy(true, visits.begin, tile);
  }

  const float scale = fabsf(p.scale);
  const float scale_log2 = fmaxf(scale * kLog2e, FLT_MIN);  // 0 times minus infinity would be NaN
  OnlineSoftmax<D> running;
  // First offsets that a lane reads: in two blocks of eight keys, and in 16 values.
  const int key_offset = tile_offset<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const int value_offset = tile_offset<D>(lane % 16, lane / 16);
  for (int i = visits.begin; i < visits.end; i++) {
    const unsigned char* tile_keys = key_buffer + (i - visits.begin) % 2 * kTileBytes;
    const unsigned char* tile_values = value_buffer + (i - visits.begin) % 2 * kTileBytes;

    cp_async_wait_group<1>();  // the keys have arrived; the values may be in flight
    __syncthreads();           // for all threads; and no thread reads the other two buffers any more
    copy(false, i + 1, next_tile);
    copy(true, i + 1, next_tile);
    const int tile_after_next = visits.tile(i + 2);  // loaded while the products run
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
        ldmatrix_x4(key, tile_keys + n * 8 * D * 2 + (key_offset ^ step * 32));
        mma<T>(scores[n], query[step], {key[0], key[1]});
        mma<T>(scores[n + 1], query[step], {key[2], key[3]});
      }
    }
    const int left = keys.count() - tile * kKeys;
    if (left < kKeys) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (n * 8 + lane % 4 * 2 + j % 2 >= left) scores[n][j] = -INFINITY;
        }
      }
    }
    running.update(scores, scale_log2);

    cp_async_wait_group<2>();  // the values have arrived; the next keys and values may be in flight
    __syncthreads();           // for all threads
#pragma unroll
    for (int step = 0; step < kKeys / 16; step++) {
      const uint32_t weights[4] = {
          packed<T>(scores[2 * step][0], scores[2 * step][1]), packed<T>(scores[2 * step][2], scores[2 * step][3]),
          packed<T>(scores[2 * step + 1][0], scores[2 * step + 1][1]), packed<T>(scores[2 * step + 1][2], scores[2 * step + 1][3])};
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        uint32_t value[4];  // two blocks of eight columns
        ldmatrix_x4_trans(value, tile_values + step * 16 * D * 2 + (value_offset ^ n * 16));
        mma<T>(running.out[n], weights, {value[0], value[1]});
        mma<T>(running.out[n + 1], weights, {value[2], value[3]});
      }
    }
    tile = next_tile;
    next_tile = tile_after_next;
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
      // Workspace: [splits, max_rows, num_heads] log-sum-exps, then [splits, max_rows, num_heads, head_dim] outputs.
      const int64_t rows_of_all = int64_t(p.max_rows) * p.num_heads;
      const int64_t part_row = split * rows_of_all + row * p.num_heads + column;
      float* out = at<float>(p.workspace, (splits * rows_of_all + 3) / 4 * 4 + part_row * D);
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        *reinterpret_cast<float2*>(out + n * 8 + lane % 4 * 2) = make_float2(running.out[n][2 * half], running.out[n][2 * half + 1]);
      }
      if (lane % 4 == 0) at<float>(p.workspace)[part_row] = row_lse;
    }
  }
}

// attention_combine: merges the splits ("parts") of each query row and head, in order, so that the bits do not change.
//
// grid    (rows * num_heads / 8, rounded up)
// block   256 threads. A warp owns one query row and head.
// shared  none
// loads   lane l has the log-sum-exps of parts l and l + 32, and columns 4 l to 4 l + 3. The first parts are loaded before it
//         is known which have keys, so that no load waits for another. Of the later parts, those without keys are not read. A
//         part that has keys is added even if its weight is 0, so that a NaN in it shows.
// bytes   splits * (head_dim + 1) * 4 + head_dim * sizeof(element) per row and head
// bound   memory bandwidth; at 32 rows the latency of two dependent loads (cu_rows, parts)
template <class T>
__device__ __forceinline__ void combine(const dllm_attention_params& p) {
  constexpr int kBatch = 8;
  const int row_head = blockIdx.x * (256 / kWarp) + threadIdx.x / kWarp;  // the launch checks that max_rows * num_heads fits
  const int rows = clamped(at<const int32_t>(p.cu_rows)[p.num_sequences], 0, p.max_rows);
  if (row_head >= rows * p.num_heads) return;
  const int lane = threadIdx.x % kWarp, column = lane * 4;
  const bool has_columns = column < p.head_dim;
  const int64_t rows_of_all = int64_t(p.max_rows) * p.num_heads;
  const float* lse = at<const float>(p.workspace) + row_head;
  const float* parts =
      at<const float>(p.workspace, (p.max_splits * rows_of_all + 3) / 4 * 4 + int64_t(row_head) * p.head_dim + column);

  float weights[2];
  uint32_t with_keys[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int s = lane + i * kWarp;
    weights[i] = s < p.max_splits ? lse[s * rows_of_all] : -INFINITY;
    with_keys[i] = __ballot_sync(kAllLanes, weights[i] != -INFINITY);
  }
  float4 part[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; i++) {
    if (i < p.max_splits && has_columns) part[i] = *reinterpret_cast<const float4*>(parts + i * rows_of_all * p.head_dim);
  }
  const auto larger = [](float a, float b) { return fmaxf(a, b); };  // ignores NaN
  const float top = fmaxf(warp_reduce(fmaxf(weights[0], weights[1]), larger), -FLT_MAX);
#pragma unroll
  for (int i = 0; i < 2; i++) weights[i] = ex2_approx((weights[i] - top) * kLog2e);
  const float total = warp_reduce(weights[0] + weights[1], Sum());
  const float inverse = total == 0.f ? 0.f : 1.f / total;

  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int first = 0; first < p.max_splits; first += kBatch) {
    const uint32_t counting = (first < kWarp ? with_keys[0] : with_keys[1]) >> first % kWarp;  // no bit past the last part
    float weight[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int s = first + i;
      weight[i] = __shfl_sync(kAllLanes, first < kWarp ? weights[0] : weights[1], s % kWarp) * inverse;
      const bool counts = (counting >> i & 1) && has_columns;
      if (first > 0 && counts) part[i] = *reinterpret_cast<const float4*>(parts + s * rows_of_all * p.head_dim);
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      if (!(counting >> i & 1)) continue;
      sum.x += weight[i] * part[i].x;
      sum.y += weight[i] * part[i].y;
      sum.z += weight[i] * part[i].z;
      sum.w += weight[i] * part[i].w;
    }
  }
  if (has_columns) {
    T* out = at<T>(p.out, int64_t(row_head / p.num_heads) * p.out_stride + row_head % p.num_heads * p.head_dim + column);
    *reinterpret_cast<uint2*>(out) = make_uint2(packed<T>(sum.x, sum.y), packed<T>(sum.z, sum.w));
  }
  if (p.lse && lane == 0) at<float>(p.lse)[row_head] = total == 0.f ? -INFINITY : top + logf(total);
}

}  // namespace

// Minimum number of blocks per multiprocessor for __launch_bounds__; 0: not given. Without it, eight warps at head_dim 64 use
// five registers too many for two blocks. (For the other kernels a value of 1 makes ptxas use more registers.)
constexpr int min_blocks(int D, int warps) { return warps == 8 && D == 64 ? 2 : 0; }

#define ATTENTION(name, T, D, warps)                                               \
  extern "C" __global__ void __launch_bounds__(warps * 32, min_blocks(D, warps))   \
      name(DLLM_PARAMS dllm_attention_params p) {                                  \
    attention<T, D, warps>(p);                                                     \
  }                                                                                \
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
