// unmask: from logits to committed tokens in one launch. LLaDA's remasking, Fast-dLLM sections 3.2 and 3.3, Dream's
// confidences; what is computed stands in src/oracle/unmask.rs.
//
// grid    (chunks, max_rows). A block owns one chunk of 8,192 logits of one row. Where a row is cut depends on the
//         vocabulary only, so that a row's bits do not depend on what else is in the batch.
// block   256 threads of 32 logits each. The plain form (argmax, probability) has all of them in registers before it looks at
//         the first: four loads of 16 bytes a thread under way for bf16, eight for f32.
// phases  1. each block: largest logit and sum of exponentials of its chunk           -> partial, in the workspace
//         2. the last block of a row merges its partials: token and confidence        -> result, in the workspace
//         3. the last row of a sequence selects among its results and writes tokens
//         "Last" is told by counters in the workspace, which are left at zero for the next launch.
// shared  8 KiB of keys for phase 3 (general form: 32 KiB, phase 1's logits before), and the reductions' 1 KiB
// bytes   vocab_size * sizeof(element) a masked row, twice that with guidance; rows that are not masked are not read
// bound   by memory bandwidth from a few hundred rows on; at 32 rows by three dependent loads and the counters
//
// The mask token is left out of the chunks and put back when a row is merged, where it is known whether it would win
// (then it counts as minus infinity) or not (then it keeps its share of the sum).
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

// What phase 1 and 2 know of a chunk, or of several. The mask token is counted apart.
struct Partial {
  float max;     // largest logit; minus infinity: there is none
  int token;     // its token
  float sum;     // of e^x, x = (l - max) / temperature of confidences
  float second;  // second largest logit
  float moment;  // of e^x x
  float noised;  // largest logit + temperature * noise
  int drawn;     // its token
  float mask;    // the mask token's logit; minus infinity: it is not here
};

// A row as phase 3 sees it.
struct Result {
  float confidence;
  int token;
};
constexpr int kNotMasked = -1, kNoFiniteLogit = -2, kBadIndex = -3;

// The workspace: counters first, everything else written before it is read.
struct Workspace {
  uint32_t* sequence_counter;  // [num_sequences]
  uint32_t* row_counter;       // [max_rows]
  Result* results;             // [max_rows]
  uint64_t* keys;              // [max_rows], for sequences of more rows than shared memory has room for
  Partial* partials;           // [max_rows, chunks]

  __device__ explicit Workspace(const dllm_unmask_params& p) {
    const int64_t counters = (int64_t(p.num_sequences) + p.max_rows + 3) / 4 * 4;
    sequence_counter = at<uint32_t>(p.workspace);
    row_counter = sequence_counter + p.num_sequences;
    results = at<Result>(p.workspace + counters * 4);
    keys = at<uint64_t>(p.workspace + counters * 4) + p.max_rows;
    // 16 bytes a row so far: the partials are aligned too.
    partials = at<Partial>(p.workspace + counters * 4) + (int64_t(p.max_rows) + 1) / 2;
  }
};

// One over the temperature of the confidences.
__device__ __forceinline__ float inverse_scale(const dllm_unmask_params& p) {
  return p.tempered_confidence && p.temperature > 0.f ? 1.f / p.temperature : 1.f;
}


// One logit as the chunks see it.
template <class T>
__device__ __forceinline__ float logit_at(const dllm_unmask_params& p, int64_t row, int token, float min_logit) {
  const float logit = logit_of<T>(p, row, token);
  return logit < min_logit ? -INFINITY : logit;
}

// Vector v of this thread's part of a chunk begins here: thread t holds vectors t, t + 256, ..., so that the block reads
// 4 KiB in one piece.
template <class T>
__device__ __forceinline__ int first_token(int chunk, int v) {
  return chunk * kChunk + (v * kThreads + int(threadIdx.x)) * kVector<T>;
}

// Takes the mask token out of logits, which the one thread that has it does; the same result in all threads: its logit.
template <class F>
__device__ __forceinline__ float without_mask(int mask_token, int chunk, F take) {
  __shared__ float mask;
  if (mask_token / kChunk != chunk) return -INFINITY;  // nobody here has it
  if (threadIdx.x == 0) mask = -INFINITY;
  __syncthreads();
  take(&mask);
  __syncthreads();
  return mask;
}

// Phase 1, plain: argmax and sum, from registers. A logit costs its unpacking, one maximum, and a multiplication, an
// exponential and an addition; which token the maximum is of is looked for by the threads that have it. NaN and plus infinity
// are dealt with when they show: maxima ignore NaN, sums do not.
template <class T>
__device__ __forceinline__ Partial score_plain(const dllm_unmask_params& p, const dllm_unmask_row& row, int chunk) {
  constexpr int kVectors = kPerThread / kVector<T>;
  const T* logits_row = at<const T>(p.logits, int64_t(row.logits_row) * p.logits_stride);
  uint4 bits[kVectors];
  load_all(logits_row, first_token<T>(chunk, 0), kThreads * kVector<T>, p.vocab_size, bits);
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
      for (int j = 0; j < kVector<T>; j++) sum += exp_of(logits[v].x[j] - reference);
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

// Phase 1, general: also guidance, a cut, draws, margin and entropy. That is more than registers hold: the logits lie in
// shared memory, each thread's own for itself.
template <class T>
__device__ __forceinline__ Partial score_general(const dllm_unmask_params& p, const dllm_unmask_row& row, float min_logit, int chunk,
                                                 float* shared) {
  constexpr int kVec = kVector<T>;
  float* logits = shared + threadIdx.x;  // logits[i * kThreads]
  const auto token_of = [&](int i) { return first_token<T>(chunk, i / kVec) + i % kVec; };

  // Sixty-four bytes a thread under way at a time.
  constexpr int kBatch = 4, kStep = kThreads * kVec;
  const int64_t offset = int64_t(row.logits_row) * p.logits_stride;
  const auto each = [&](uint64_t from, auto put) {
#pragma unroll 1
    for (int batch = 0; batch < kPerThread / kVec; batch += kBatch) {
      uint4 bits[kBatch];
      load_all(at<const T>(from, offset), first_token<T>(chunk, batch), kStep, p.vocab_size, bits);
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
    const float weight = exp_of(x);
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
      // No noise exceeds 37: -ln(-ln(1 - 2^-53)).
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

// Of two sets of logits, that of both; the same whichever comes first.
template <bool kGeneral>
__device__ __forceinline__ Partial merged(const Partial& a, const Partial& b, float scale) {
  const bool a_first = ranked(a.max, a.token) > ranked(b.max, b.token);
  Partial high = a_first ? a : b;
  const Partial low = a_first ? b : a;
  high.mask = fmaxf(high.mask, low.mask);
  if (low.sum > 0.f) {
    const float x = (low.max - high.max) * scale;
    const float weight = exp_of(x);
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
  const uint4 halves[2] = {load_shared_by_blocks(words), load_shared_by_blocks(words + 1)};
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
    const float weight = exp_of(x);
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
      result.confidence = exp_of((logit - all.max) * scale) / all.sum;
      break;
    }
    case DLLM_CONFIDENCE_MARGIN:
      result.confidence = (1.f - exp_of((all.second - all.max) * scale)) / all.sum;
      break;
    case DLLM_CONFIDENCE_ENTROPY:
      // sum p ln p. The originals add 1e-10 inside the logarithm, which is worth vocab_size * 1e-10 at the most.
      result.confidence = all.moment / all.sum - logf(all.sum);
      break;
    default: {
      const uint32_t step = p.steps ? at<const int32_t>(p.steps)[row.sequence] : 0;
      result.confidence = uniform(philox(p.seed, kConfidence, step, row.position, 0));
    }
  }
  return result;
}

// Fast-dLLM's factor rule: how many of `n` to take, keys being their confidences. The bounds 1 - factor / (j + 2) grow and
// sorted confidences fall, so that the j-th is the first to fail its bound exactly if at most j reach it: no sorting.
__device__ __forceinline__ int count_by_factor(const uint64_t* keys, int rows, int n, float factor) {
  int low = 1, high = n;  // the first to fail is in low..=high, n is none; the best never fails
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
  // The scan of the original, quirk included: when only the last one fails, it is taken all the same.
  int count = min(low, n - 1);
  if (count == 0 || count == n - 1) count++;
  return min(count, n);
}

// Phase 3: the whole block, for the sequence that owns rows first .. first + rows.
__device__ void select_and_commit(const dllm_unmask_params& p, const Workspace& workspace, int sequence, int first, int rows,
                                  uint64_t* shared_keys) {
  uint64_t* keys = rows <= kSharedKeys ? shared_keys : workspace.keys + first;
  const dllm_unmask_row* table = at<const dllm_unmask_row>(p.rows) + first;
  const Result* results = workspace.results + first;
  const int before = p.commit_before ? at<const int32_t>(p.commit_before)[sequence] : 0x7fffffff;
  const uint32_t step = p.steps ? at<const int32_t>(p.steps)[sequence] : 0;
  const int quota = p.quota ? at<const int32_t>(p.quota)[sequence] : 0x7fffffff;

  // Keys: 0 for rows that are not to be committed whatever happens.
  int eligible = 0, reach = 0, failed = 0x7fffffff, bad = 0;
  uint64_t best = 0;
  for (int i = threadIdx.x; i < rows; i += kThreads) {
    const Result result{load_shared_by_blocks(&results[i].confidence), load_shared_by_blocks(&results[i].token)};
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
  uint64_t bound = 0;  // exactly `count` keys reach it; 0: to be found
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
      // Only a table that contradicts itself has a key for a token that is not there.
      if (keys[i] >= bound && token >= 0 && token < p.num_tokens) {
        at<int32_t>(p.tokens)[token] = load_shared_by_blocks(&results[i].token);
      }
    }
  }
  if (threadIdx.x == 0) {
    at<int32_t>(p.masks_left)[sequence] = eligible - count;
    at<int32_t>(p.committed)[sequence] = count;
    at<int32_t>(p.failed)[sequence] = bad ? DLLM_INDEX_FAILED : failed == 0x7fffffff ? DLLM_NONE_FAILED : failed;
  }
}

// Sequences without rows have no block of their own.
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
  const uint4 row_bits = at<const uint4>(p.rows)[row_index];  // under way while cu_rows is
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

#define UNMASK(name, T, general)                                                                  \
  extern "C" __global__ void __launch_bounds__(kThreads, 4) name(DLLM_PARAMS dllm_unmask_params p) { \
    unmask<T, general>(p);                                                                        \
  }                                                                                               \
  SOFTGPU_KERNEL(name)

UNMASK(unmask_bf16, __nv_bfloat16, false)
UNMASK(unmask_f16, __half, false)
UNMASK(unmask_f32, float, false)
UNMASK(unmask_general_bf16, __nv_bfloat16, true)
UNMASK(unmask_general_f16, __half, true)
UNMASK(unmask_general_f32, float, true)
