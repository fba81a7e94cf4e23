// unmask: from logits to committed tokens in one launch: LLaDA's remasking, Fast-dLLM sections 3.2 and 3.3, Dream's
// confidences. Reference: src/sampling/sampler.rs. Launch: src/ops/unmask.rs.
//
// grid    (chunks, max_rows). A block owns one chunk of 8,192 logits of one row. The chunks of a row depend on the vocabulary
//         only, so that a row's bits do not depend on the batch.
// block   256 threads of 32 logits each. The plain form (argmax, probability) loads all of them into registers before it uses
//         the first: four loads of 16 bytes per thread in flight for bf16, eight for f32.
// phases  1. each block: largest logit and sum of exponentials of its chunk           -> partial, in the workspace
//         2. the last block of a row merges its partials: token and confidence        -> result, in the workspace
//         3. the last row of a sequence selects among its results and writes tokens
//         Counters in the workspace determine which block or row is last; they are reset to zero for the next launch.
// shared  8 KiB of keys in phase 3 (general form: 32 KiB, which hold the logits of phase 1 before), and 1 KiB for reductions
// bytes   vocab_size * sizeof(element) per masked row, twice that with guidance; rows that are not masked are not read
// bound   memory bandwidth from a few hundred rows on; at 32 rows the latency of three dependent loads and the counters
//
// The mask token is left out of the chunks and added when a row is merged. Only then is it known whether it would win (it
// counts as minus infinity) or not (it keeps its share of the sum).
#include "logits.cuh"
#include "memory.cuh"
#include "philox.cuh"
#include "reduce.cuh"
#include "select.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 32;
constexpr int kChunk = kThreads * kPerThread;
constexpr int kSharedKeys = 1024;
static_assert(kThreads == kBuckets, "phase 3 selects with the whole block");

// Statistics of one or several chunks of logits. The mask token is kept apart.
struct Partial {
  float max;     // largest logit; minus infinity if there is none
  int token;     // its token
  float sum;     // of e^x, x = (l - max) / temperature of the confidences
  float second;  // second largest logit
  float moment;  // of e^x x
  float noised;  // largest logit + temperature * noise
  int drawn;     // its token
  float mask;    // the mask token's logit; minus infinity in other chunks
};

// Result of a row, the input of phase 3.
struct Result {
  float confidence;
  int token;
};
constexpr int kNotMasked = -1, kNoFiniteLogit = -2, kBadIndex = -3;

// Layout of the workspace. Counters come first; everything else is written before it is read.
struct Workspace {
  uint32_t* sequence_counter;  // [num_sequences]
  uint32_t* row_counter;       // [max_rows]
  Result* results;             // [max_rows]
  uint64_t* keys;              // [max_rows], for sequences with more rows than kSharedKeys
  Partial* partials;           // [max_rows, chunks]

  __device__ explicit Workspace(const dllm_unmask_params& p) {
    const int64_t counters = (int64_t(p.num_sequences) + p.max_rows + 3) / 4 * 4;
    sequence_counter = at<uint32_t>(p.workspace);
    row_counter = sequence_counter + p.num_sequences;
    results = at<Result>(p.workspace + counters * 4);
    keys = at<uint64_t>(p.workspace + counters * 4) + p.max_rows;
    // 16 bytes per row so far, so that the partials are aligned too.
    partials = at<Partial>(p.workspace + counters * 4) + (int64_t(p.max_rows) + 1) / 2;
  }
};

// Reciprocal of the temperature of the confidences.
__device__ __forceinline__ float inverse_scale(const dllm_unmask_params& p) {
  return p.tempered_confidence && p.temperature > 0.f ? 1.f / p.temperature : 1.f;
}

// One logit; minus infinity below min_logit.
template <class T>
__device__ __forceinline__ float logit_at(const dllm_unmask_params& p, int64_t row, int token, float min_logit) {
  const float logit = logit_of<T>(p, row, token);
  return logit < min_logit ? -INFINITY : logit;
}

// First token of vector v of this thread in a chunk. Thread t holds vectors t, t + 256, ..., so that the block reads 4 KiB
// of consecutive memory.
template <class T>
__device__ __forceinline__ int first_token(int chunk, int v) {
  return chunk * kChunk + (v * kThreads + int(threadIdx.x)) * kVector<T>;
}

// Removes the mask token from the logits and returns its logit in all threads. `take` does so in the thread that holds it.
template <class F>
__device__ __forceinline__ float without_mask(int mask_token, int chunk, F take) {
  __shared__ float mask;
  if (mask_token / kChunk != chunk) return -INFINITY;  // not in this chunk
  if (threadIdx.x == 0) mask = -INFINITY;
  __syncthreads();
  take(&mask);
  __syncthreads();
  return mask;
}

// Phase 1, plain form: argmax and sum, from registers. A logit costs its unpacking, one maximum, and a multiplication, an
// exponential and an addition. Only threads that hold the maximum search for its token. NaN and plus infinity are handled on
// demand: maxima ignore NaN, sums do not, and a sum that is not finite repeats the loop with sanitized logits.
template <class T>
__device__ __forceinline__ Partial score_plain(const dllm_unmask_params& p, const dllm_unmask_row& row, int chunk) {
  constexpr int kVectors = kPerThread / kVector<T>;
  const T* logits_row = at<const T>(p.logits, int64_t(row.logits_row) * p.logits_stride);
  uint4 bits[kVectors];
  load_vectors(logits_row, first_token<T>(chunk, 0), kThreads * kVector<T>, p.vocab_size, bits);
  Vector<T> logits[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; v++) logits[v] = Vector<T>::unpack(bits[v]);

  Partial partial{};
  partial.mask = without_mask(p.mask_token, chunk, [&](float* mask) {
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
#pragma unroll
      for (int j = 0; j < kVector<T>; j++) {
        if (first_token<T>(chunk, v) + j != p.mask_token) continue;
        if (p.mask_token < p.vocab_size) *mask = sanitized(logits[v].x[j]);
        logits[v].x[j] = -INFINITY;
      }
    }
  });

  float max, own, sum;
  uint64_t both;
  for (bool clean = false;; clean = true) {
    own = -INFINITY;
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
#pragma unroll
      for (int j = 0; j < kVector<T>; j++) {
        if (clean) logits[v].x[j] = sanitized(logits[v].x[j]);
        own = fmaxf(own, logits[v].x[j]);
      }
    }
    max = block_reduce<kThreads>(own, -INFINITY, Max());
    const float reference = fmaxf(max, -FLT_MAX);  // finite, so that minus infinity stays minus infinity
    sum = 0.f;
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
#pragma unroll
      for (int j = 0; j < kVector<T>; j++) sum += exp_approx(logits[v].x[j] - reference);
    }
    int token = 0x7fffffff;
    if (own == max && max > -INFINITY) {
#pragma unroll
      for (int v = kVectors - 1; v >= 0; v--) {
#pragma unroll
        for (int j = kVector<T> - 1; j >= 0; j--) token = logits[v].x[j] == max ? first_token<T>(chunk, v) + j : token;
      }
    }
    both = block_reduce<kThreads>(sum_and_index(sum, token), sum_and_index(0.f, 0x7fffffff), SumAndLowest());
    if (clean || sum_of(both) < INFINITY) break;  // NaN fails this too
  }
  partial.max = max;
  partial.token = index_of(both);
  partial.sum = sum_of(both);
  return partial;
}

// Phase 1, general form: also guidance, min_logit, draws, margin and entropy. Registers do not suffice: each thread keeps its
// logits in shared memory.
template <class T>
__device__ __forceinline__ Partial score_general(const dllm_unmask_params& p, const dllm_unmask_row& row, float min_logit,
                                                 int chunk, float* shared) {
  constexpr int kVec = kVector<T>;
  float* logits = shared + threadIdx.x;  // logits[i * kThreads]
  const auto token_of = [&](int i) { return first_token<T>(chunk, i / kVec) + i % kVec; };

  // 64 bytes per thread in flight.
  constexpr int kBatch = 4, kStep = kThreads * kVec;
  const int64_t offset = int64_t(row.logits_row) * p.logits_stride;
  const auto each = [&](uint64_t from, auto put) {
#pragma unroll 1
    for (int batch = 0; batch < kPerThread / kVec; batch += kBatch) {
      uint4 bits[kBatch];
      load_vectors(at<const T>(from, offset), first_token<T>(chunk, batch), kStep, p.vocab_size, bits);
#pragma unroll
      for (int v = 0; v < kBatch; v++) {
        const Vector<T> vector = Vector<T>::unpack(bits[v]);
#pragma unroll
        for (int j = 0; j < kVec; j++) put(logits[((batch + v) * kVec + j) * kThreads], vector.x[j]);
      }
    }
  };
  each(p.logits, [](float& logit, float conditional) { logit = conditional; });
  if (p.uncond_logits) {
    each(p.uncond_logits, [&](float& logit, float unconditional) { logit = guided(logit, unconditional, p.cfg_scale); });
  }
  Partial partial{};
  partial.mask = without_mask(p.mask_token, chunk, [&](float* mask) {
    for (int i = 0; i < kPerThread; i++) {
      if (token_of(i) != p.mask_token) continue;
      const float logit = sanitized(logits[i * kThreads]);
      if (p.mask_token < p.vocab_size && logit >= min_logit) *mask = logit;
      logits[i * kThreads] = -INFINITY;
    }
  });
  float max = -INFINITY;
  int best = 0;
#pragma unroll 4
  for (int i = 0; i < kPerThread; i++) {
    float logit = sanitized(logits[i * kThreads]);
    if (logit < min_logit) logit = -INFINITY;
    logits[i * kThreads] = logit;
    if (logit > max) {
      max = logit;
      best = token_of(i);
    }
  }
  const uint64_t top = block_reduce<kThreads>(ranked(max, best), uint64_t(0), Max());
  partial.max = rank_value(top);
  partial.token = rank_index(top);

  const float scale = inverse_scale(p);
  const float reference = fmaxf(partial.max, -FLT_MAX);
  float sum = 0.f, moment = 0.f, second = -INFINITY;
#pragma unroll 4
  for (int i = 0; i < kPerThread; i++) {
    const float logit = logits[i * kThreads];
    const float x = (logit - reference) * scale;
    const float weight = exp_approx(x);
    sum += weight;
    if (weight > 0.f) moment += weight * x;
    if (token_of(i) != partial.token) second = fmaxf(second, logit);
  }
  partial.sum = block_reduce<kThreads>(sum, 0.f, Sum());
  partial.moment = block_reduce<kThreads>(moment, 0.f, Sum());
  partial.second = block_reduce<kThreads>(second, -INFINITY, Max());

  partial.noised = -INFINITY;
  if (p.temperature > 0.f) {
    const uint32_t step = p.steps ? at<const int32_t>(p.steps)[row.sequence] : 0;
    float noised = -INFINITY;
    int drawn = 0;
    for (int i = 0; i < kPerThread; i++) {
      const float logit = logits[i * kThreads];
      // Noise is at most -ln(-ln(1 - 2^-53)) < 37.
      if (!(logit + p.temperature * 37.f > noised)) continue;
      const float value = logit + p.temperature * gumbel(philox(p.seed, kToken, step, row.position, token_of(i)));
      if (value > noised) {
        noised = value;
        drawn = token_of(i);
      }
    }
    const uint64_t winner = block_reduce<kThreads>(ranked(noised, drawn), uint64_t(0), Max());
    partial.noised = rank_value(winner);
    partial.drawn = rank_index(winner);
  }
  return partial;
}

// Statistics of the union of two sets of logits; symmetric in a and b.
template <bool kGeneral>
__device__ __forceinline__ Partial merged(const Partial& a, const Partial& b, float scale) {
  const bool a_first = ranked(a.max, a.token) > ranked(b.max, b.token);
  Partial high = a_first ? a : b;
  const Partial low = a_first ? b : a;
  high.mask = fmaxf(high.mask, low.mask);
  if (low.sum > 0.f) {
    const float x = (low.max - high.max) * scale;
    const float weight = exp_approx(x);
    high.sum += weight * low.sum;
    if (kGeneral && weight > 0.f) high.moment += weight * (low.moment + x * low.sum);
  }
  if (kGeneral) {
    high.second = fmaxf(high.second, low.max);
    if (ranked(low.noised, low.drawn) > ranked(high.noised, high.drawn)) {
      high.noised = low.noised;
      high.drawn = low.drawn;
    }
  }
  return high;
}

__device__ __forceinline__ Partial shuffled(const Partial& a, int lanes) {
  Partial b;
  b.max = __shfl_xor_sync(kAllLanes, a.max, lanes);
  b.token = __shfl_xor_sync(kAllLanes, a.token, lanes);
  b.sum = __shfl_xor_sync(kAllLanes, a.sum, lanes);
  b.second = __shfl_xor_sync(kAllLanes, a.second, lanes);
  b.moment = __shfl_xor_sync(kAllLanes, a.moment, lanes);
  b.noised = __shfl_xor_sync(kAllLanes, a.noised, lanes);
  b.drawn = __shfl_xor_sync(kAllLanes, a.drawn, lanes);
  b.mask = __shfl_xor_sync(kAllLanes, a.mask, lanes);
  return b;
}

__device__ __forceinline__ Partial load_partial(const Partial* from) {
  const uint4* words = reinterpret_cast<const uint4*>(from);
  const uint4 halves[2] = {load_from_other_block(words), load_from_other_block(words + 1)};
  Partial partial;
  memcpy(&partial, halves, sizeof partial);
  return partial;
}

// Phase 2, one warp: token and confidence of a row.
template <class T, bool kGeneral>
__device__ __forceinline__ Result merge_row(const dllm_unmask_params& p, const dllm_unmask_row& row, const Partial* partials,
                                            float min_logit) {
  const int chunks = gridDim.x;
  const float scale = kGeneral ? inverse_scale(p) : 1.f;
  Partial all{-INFINITY, 0x7fffffff, 0.f, -INFINITY, 0.f, -INFINITY, 0x7fffffff, -INFINITY};
  for (int c = threadIdx.x; c < chunks; c += kWarp) all = merged<kGeneral>(all, load_partial(partials + c), scale);
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) all = merged<kGeneral>(all, shuffled(all, lanes), scale);
  if (all.max == -INFINITY) return {0.f, kNoFiniteLogit};

  const bool mask_wins = ranked(all.mask, p.mask_token) > ranked(all.max, all.token);
  if (!mask_wins && all.mask > -INFINITY) {
    const float x = (all.mask - all.max) * scale;
    const float weight = exp_approx(x);
    all.sum += weight;
    if (kGeneral && weight > 0.f) all.moment += weight * x;
    all.second = fmaxf(all.second, all.mask);
  }
  if (!kGeneral) return {1.f / all.sum, all.token};

  const bool draws = p.temperature > 0.f;
  Result result{0.f, draws ? all.drawn : all.token};
  switch (p.confidence_kind) {
    case DLLM_CONFIDENCE_PROBABILITY: {
      const float logit = draws ? logit_at<T>(p, row.logits_row, result.token, min_logit) : all.max;
      result.confidence = exp_approx((logit - all.max) * scale) / all.sum;
      break;
    }
    case DLLM_CONFIDENCE_MARGIN:
      result.confidence = (1.f - exp_approx((all.second - all.max) * scale)) / all.sum;
      break;
    case DLLM_CONFIDENCE_ENTROPY:
      // sum p ln p. The reference implementations add 1e-10 inside the logarithm, which changes at most vocab_size * 1e-10.
      result.confidence = all.moment / all.sum - logf(all.sum);
      break;
    default: {
      const uint32_t step = p.steps ? at<const int32_t>(p.steps)[row.sequence] : 0;
      result.confidence = uniform(philox(p.seed, kConfidence, step, row.position, 0));
    }
  }
  return result;
}

// Fast-dLLM's factor rule: number of the `n` candidates to commit, with their confidences in the keys. The bounds
// 1 - factor / (j + 2) increase and sorted confidences decrease. So the j-th is the first to fail its bound exactly if at most
// j candidates reach that bound, and no sorting is needed.
__device__ __forceinline__ int count_by_factor(const uint64_t* keys, int rows, int n, float factor) {
  int low = 1, high = n;  // the first to fail is in low..=high, n if none fails; the best never fails
  while (low < high) {
    const int middle = (low + high) / 2;
    int reach = 0;
    const float bound = 1.f - factor / (middle + 2);
    for (int i = threadIdx.x; i < rows; i += kThreads) reach += keys[i] && rank_value(keys[i]) >= bound;
    if (block_reduce<kThreads>(reach, 0, Sum()) <= middle) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  // As in the reference implementation: when only the last one fails, it is committed as well.
  int count = min(low, n - 1);
  if (count == 0 || count == n - 1) count++;
  return min(count, n);
}

// Phase 3, the whole block: selects and commits for the sequence that owns rows first .. first + rows.
__device__ void select_and_commit(const dllm_unmask_params& p, const Workspace& workspace, int sequence, int first, int rows,
                                  uint64_t* shared_keys) {
  uint64_t* keys = rows <= kSharedKeys ? shared_keys : workspace.keys + first;
  const dllm_unmask_row* table = at<const dllm_unmask_row>(p.rows) + first;
  const Result* results = workspace.results + first;
  const int before = p.commit_before ? at<const int32_t>(p.commit_before)[sequence] : 0x7fffffff;
  const uint32_t step = p.steps ? at<const int32_t>(p.steps)[sequence] : 0;
  const int quota = p.quota ? at<const int32_t>(p.quota)[sequence] : 0x7fffffff;

  // Keys: 0 for rows that are not candidates.
  int eligible = 0, reach = 0, failed = 0x7fffffff, bad = 0;
  uint64_t best = 0;
  for (int i = threadIdx.x; i < rows; i += kThreads) {
    const Result result{load_from_other_block(&results[i].confidence), load_from_other_block(&results[i].token)};
    const int position = table[i].position;
    uint64_t key = 0;
    if (result.token >= 0 && position < before) {
      float rank = result.confidence;
      if (p.alg_temp > 0.f) rank = rank / p.alg_temp + gumbel(philox(p.seed, kRank, step, position, 0));
      key = ranked(rank, i);
      eligible++;
      reach += result.confidence >= p.threshold;
    }
    if (result.token == kNoFiniteLogit) failed = min(failed, position);
    bad += result.token == kBadIndex;
    keys[i] = key;
    best = Max()(best, key);
  }
  eligible = block_reduce<kThreads>(eligible, 0, Sum());
  best = block_reduce<kThreads>(best, uint64_t(0), Max());
  failed = -block_reduce<kThreads>(-failed, -0x7fffffff, Max());
  bad = block_reduce<kThreads>(bad, 0, Sum());

  int count = max(0, min(quota, eligible));
  uint64_t bound = 0;  // exactly `count` keys reach it; 0: not known yet
  if (p.policy == DLLM_POLICY_THRESHOLD && count > 0) {
    reach = block_reduce<kThreads>(reach, 0, Sum());
    if (reach > 0 && reach <= count) bound = uint64_t(ordered(p.threshold)) << 32;
    count = min(count, max(1, reach));
  } else if (p.policy == DLLM_POLICY_FACTOR && eligible > 0) {
    count = count_by_factor(keys, rows, eligible, p.factor);
  }
  if (bad || failed != 0x7fffffff) count = 0;

  if (count > 0) {
    if (count == eligible) bound = 1;
    if (count == 1) bound = best;
    if (bound == 0) bound = kth_largest(keys, rows, count);
    for (int i = threadIdx.x; i < rows; i += kThreads) {
      const int token = table[i].token;
      // Only an inconsistent table has a key for a token out of range.
      if (keys[i] >= bound && token >= 0 && token < p.num_tokens) {
        at<int32_t>(p.tokens)[token] = load_from_other_block(&results[i].token);
      }
    }
  }
  if (threadIdx.x == 0) {
    at<int32_t>(p.masks_left)[sequence] = eligible - count;
    at<int32_t>(p.committed)[sequence] = count;
    at<int32_t>(p.failed)[sequence] = bad ? DLLM_INDEX_FAILED : failed == 0x7fffffff ? DLLM_NONE_FAILED : failed;
  }
}

// Writes the outputs of sequences without rows, which have no block.
__device__ void clear_empty_sequences(const dllm_unmask_params& p) {
  const int32_t* cu_rows = at<const int32_t>(p.cu_rows);
  for (int s = threadIdx.x; s < p.num_sequences; s += kThreads) {
    if (cu_rows[s + 1] > cu_rows[s]) continue;
    at<int32_t>(p.masks_left)[s] = 0;
    at<int32_t>(p.committed)[s] = 0;
    at<int32_t>(p.failed)[s] = DLLM_NONE_FAILED;
  }
}

template <class T, bool kGeneral>
__device__ __forceinline__ void unmask(const dllm_unmask_params& p) {
  // Phase 1's logits, or phase 3's keys.
  __shared__ __align__(16) unsigned char shared[kGeneral ? kChunk * sizeof(float) : kSharedKeys * sizeof(uint64_t)];
  const int row_index = blockIdx.y, chunk = blockIdx.x;
  const int32_t* cu_rows = at<const int32_t>(p.cu_rows);
  const uint4 row_bits = at<const uint4>(p.rows)[row_index];  // in flight together with cu_rows
  if (row_index == 0 && chunk == 0 && (p.num_sequences > 1 || cu_rows[1] <= 0)) clear_empty_sequences(p);
  if (row_index >= cu_rows[p.num_sequences]) return;
  dllm_unmask_row row;
  memcpy(&row, &row_bits, sizeof row);
  if (row.sequence < 0 || row.sequence >= p.num_sequences) return;
  const int first = max(0, cu_rows[row.sequence]);
  const int rows = min(cu_rows[row.sequence + 1], p.max_rows) - first;
  if (row_index < first || row_index >= first + rows) return;

  const Workspace workspace(p);
  Result result{0.f, kNotMasked};
  const bool in_range = row.token >= 0 && row.token < p.num_tokens && row.logits_row >= 0 && row.logits_row < p.num_logits_rows;
  if (!in_range) {
    result.token = kBadIndex;
    if (chunk > 0) return;
  } else if (at<const int32_t>(p.tokens)[row.token] != p.mask_token) {
    if (chunk > 0) return;
  } else {
    const float min_logit = kGeneral && p.min_logit ? at<const float>(p.min_logit)[row_index] : -INFINITY;
    Partial* partials = workspace.partials + int64_t(row_index) * gridDim.x;
    Partial partial;
    if constexpr (kGeneral) {
      partial = score_general<T>(p, row, min_logit, chunk, reinterpret_cast<float*>(shared));
    } else {
      partial = score_plain<T>(p, row, chunk);
    }
    if (threadIdx.x == 0) partials[chunk] = partial;
    if (!is_last(workspace.row_counter + row_index, gridDim.x)) return;
    if (threadIdx.x < kWarp) result = merge_row<T, kGeneral>(p, row, partials, min_logit);
  }
  if (threadIdx.x == 0) {
    workspace.results[row_index] = result;
    if (p.predicted) at<int32_t>(p.predicted)[row_index] = max(result.token, kNotMasked);
    if (p.confidence) at<float>(p.confidence)[row_index] = result.confidence;
  }
  if (!is_last(workspace.sequence_counter + row.sequence, rows)) return;
  select_and_commit(p, workspace, row.sequence, first, rows, reinterpret_cast<uint64_t*>(shared));
}

}  // namespace

#define UNMASK(name, T, general)                                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads, 4) name(DLLM_PARAMS dllm_unmask_params p) { \
    unmask<T, general>(p);                                                                           \
  }                                                                                                  \
  SOFTGPU_KERNEL(name)

UNMASK(unmask_bf16, __nv_bfloat16, false)
UNMASK(unmask_f16, __half, false)
UNMASK(unmask_f32, float, false)
UNMASK(unmask_general_bf16, __nv_bfloat16, true)
UNMASK(unmask_general_f16, __half, true)
UNMASK(unmask_general_f32, float, true)
