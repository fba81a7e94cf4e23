// advance: decoding rules between two passes; the last kernel of a step. Reference: src/reference/advance.rs. Launch:
// src/ops/advance.rs.
//
// grid    1 block. Each warp owns one sequence at a time.
// block   512 threads
// phases  1. each warp: counts masks, searches for an end-of-text token, writes quota, commit_before, steps and the sequence
//         2. one thread: counters and the first failure; then the progress record, `passes` last, after a system-wide fence
// shared  128 bytes for reductions
// bytes   per sequence: 64 of its state, 8 read and 12 written of unmask's arrays, and 4 per position examined
// bound   latency: control and sequence, tokens (128 positions of a sequence at a time), stores, the fence across the bus
//
// Values in device memory are not trusted: ranges are clamped to the tokens, counters wrap, nothing divides by zero.
#include "memory.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLoads = 4;  // loads of a lane in flight
constexpr int kTokensPerRound = kLoads * kWarp;
constexpr int kNone = 0x7fffffff;

// Totals of a warp, kept by its first lane; zero in the other lanes.
struct WarpTotals {
  int took_part = 0;
  int continuing = 0;
  int failed = kNone;  // lowest sequence that failed
};

__device__ __forceinline__ int incremented(int x) { return int(uint32_t(x) + 1u); }
__device__ __forceinline__ int clamped(int x, int low, int high) { return max(low, min(x, high)); }

// Loads the next tokens of a warp's range, of which `count` are left; past its end they are `padding`.
__device__ __forceinline__ void load_tokens(const int32_t* tokens, int count, int padding, int (&token)[kLoads]) {
#pragma unroll
  for (int i = 0; i < kLoads; i++) {
    const int position = i * kWarp + int(threadIdx.x % kWarp);
    token[i] = position < count ? tokens[position] : padding;
  }
}

// Number of masks among `count` tokens; the same in all lanes.
__device__ __forceinline__ int count_masks(const int32_t* tokens, int count, int mask_token) {
  int masks = 0;
  for (; count > 0; count -= kTokensPerRound, tokens += kTokensPerRound) {
    int token[kLoads];
    load_tokens(tokens, count, ~mask_token, token);
#pragma unroll
    for (int i = 0; i < kLoads; i++) masks += token[i] == mask_token;
  }
  return warp_reduce(masks, Sum());
}

// Whether `count` tokens contain an end-of-text token with no mask before it; the same in all lanes.
__device__ __forceinline__ bool ends(const dllm_advance_params& p, const int32_t* tokens, int count) {
  for (; count > 0; count -= kTokensPerRound, tokens += kTokensPerRound) {
    int token[kLoads];
    load_tokens(tokens, count, p.mask_token, token);
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      bool is_end = false;
#pragma unroll 1
      for (int e = 0; e < p.num_end_tokens; e++) is_end |= token[i] == at<const int32_t>(p.end_tokens)[e];
      const uint32_t masks = __ballot_sync(kAllLanes, token[i] == p.mask_token);
      const uint32_t found = __ballot_sync(kAllLanes, is_end);
      const uint32_t before_masks = (masks & (0u - masks)) - 1u;
      if (masks | found) return found & before_masks;
    }
  }
  return false;
}

// Number of tokens that a sequence may commit in a pass, with `masks` masks left in its quota range.
__device__ __forceinline__ int quota_of(const dllm_advance_params& p, const dllm_advance_control& control,
                                        const dllm_advance_sequence& sequence, int pass, int masks) {
  switch (control.schedule) {
    case DLLM_SCHEDULE_LLADA: {
      if (control.steps <= 0 || pass >= control.steps) return 1;
      const int masked = max(0, sequence.initial_masks);
      return masked / control.steps + (pass < masked % control.steps);
    }
    case DLLM_SCHEDULE_DREAM: {
      const int num_ratios = clamped(control.num_ratios, 0, p.max_ratios);
      if (pass < 0 || pass >= num_ratios - 1) return masks;
      const float share = fmaxf(float(masks) * at<const float>(p.ratios)[pass], 0.f);
      return share < float(masks) ? int(share) : masks;
    }
    case DLLM_SCHEDULE_CARRY_OVER: {
      const int per_step = clamped(sequence.per_step, 0, masks);
      return per_step + clamped(sequence.deficit, 0, masks - per_step);
    }
    default:
      return 0x7fffffff;
  }
}

__device__ __forceinline__ dllm_advance_sequence load_sequence(const uint4* from) {
  uint4 words[sizeof(dllm_advance_sequence) / sizeof(uint4)];
#pragma unroll
  for (int i = 0; i < int(sizeof(words) / sizeof(uint4)); i++) words[i] = from[i];
  dllm_advance_sequence sequence;
  memcpy(&sequence, words, sizeof sequence);
  return sequence;
}

// Phase 1, one warp: advances one sequence.
__device__ __forceinline__ void advance_sequence(const dllm_advance_params& p, const dllm_advance_control& control, int s,
                                                 WarpTotals& totals) {
  dllm_advance_sequence* stored = at<dllm_advance_sequence>(p.sequences) + s;
  dllm_advance_sequence sequence = load_sequence(reinterpret_cast<const uint4*>(stored));
  const bool took_part = sequence.active;
  bool failed = false;
  int quota = 0, commit_before = int(0x80000000u);  // below every position, so that no policy commits anything
  if (took_part) {
    const int old_quota = max(0, at<const int32_t>(p.quota)[s]);
    const int rejected = old_quota - clamped(at<const int32_t>(p.committed)[s], 0, old_quota);
    failed = at<const int32_t>(p.failed)[s] != DLLM_NONE_FAILED;
    const int first = clamped(sequence.first_token, 0, p.num_tokens);
    const int length = clamped(sequence.length, 0, p.num_tokens - first);
    const int32_t* tokens = at<const int32_t>(p.tokens, first);
    const auto masks = [&](int start, int end) {
      start = clamped(start, 0, length);
      return count_masks(tokens + start, clamped(end, start, length) - start, p.mask_token);
    };

    const int pass = incremented(control.pass);
    sequence.forwards = incremented(sequence.forwards);
    if (p.num_end_tokens > 0) {
      const int generated = clamped(sequence.generated, 0, length);
      sequence.ended = ends(p, tokens + generated, length - generated);
    }
    if (control.schedule == DLLM_SCHEDULE_CARRY_OVER) {
      sequence.deficit = rejected;
      if (pass >= sequence.max_passes && rejected > 0) {
        sequence.max_passes = incremented(sequence.max_passes);
        sequence.per_step = 0;
      }
    }
    sequence.active = !failed && !sequence.ended && pass < sequence.max_passes &&
                      masks(sequence.active_start, sequence.active_end) > 0;
    if (sequence.active) {
      const bool counts = control.schedule == DLLM_SCHEDULE_DREAM || control.schedule == DLLM_SCHEDULE_CARRY_OVER;
      quota = quota_of(p, control, sequence, pass, counts ? masks(sequence.quota_start, sequence.quota_end) : 0);
      commit_before = sequence.commit_before;
    }
  }
  __syncwarp();  // all lanes have read the values that the first lane overwrites
  if (threadIdx.x % kWarp > 0) return;
  at<int32_t>(p.quota)[s] = quota;
  at<int32_t>(p.commit_before)[s] = commit_before;
  at<int32_t>(p.steps)[s] = sequence.forwards;
  if (!took_part) return;
  stored->per_step = sequence.per_step;
  stored->deficit = sequence.deficit;
  stored->max_passes = sequence.max_passes;
  stored->forwards = sequence.forwards;
  stored->active = sequence.active;
  stored->ended = sequence.ended;
  totals.took_part++;
  totals.continuing += sequence.active;
  if (failed) totals.failed = min(totals.failed, s);
}

// Phase 2, one thread. Once the host reads `passes`, it must find all other fields of that launch.
__device__ __forceinline__ void report_progress(const dllm_advance_control& control, int active, dllm_progress* progress) {
  st_relaxed_sys(&progress->nfe, control.nfe);
  st_relaxed_sys(&progress->active, active);
  st_relaxed_sys(&progress->failed_sequence, control.failed_sequence);
  st_relaxed_sys(&progress->failed_position, control.failed_position);
  st_relaxed_sys(&progress->failed_step, control.failed_step);
  __threadfence_system();
  st_relaxed_sys(&progress->passes, control.passes);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) advance(DLLM_PARAMS dllm_advance_params p) {
  dllm_advance_control control = *at<const dllm_advance_control>(p.control);
  WarpTotals totals;
  for (int s = threadIdx.x / kWarp; s < p.num_sequences; s += kWarps) advance_sequence(p, control, s, totals);
  const int took_part = block_reduce<kThreads>(totals.took_part, 0, Sum());
  const int continuing = block_reduce<kThreads>(totals.continuing, 0, Sum());
  const int failed = -block_reduce<kThreads>(-totals.failed, -kNone, Max());
  if (threadIdx.x > 0) return;
  control.pass = incremented(control.pass);
  control.passes = incremented(control.passes);
  if (took_part > 0) control.nfe = incremented(control.nfe);
  if (failed != kNone && control.failed_sequence == DLLM_NONE_FAILED) {
    control.failed_sequence = failed;
    control.failed_position = at<const int32_t>(p.failed)[failed];
    control.failed_step = int(uint32_t(at<const dllm_advance_sequence>(p.sequences)[failed].forwards) - 1u);
  }
  *at<dllm_advance_control>(p.control) = control;
  report_progress(control, continuing, at<dllm_progress>(p.progress));
}
SOFTGPU_KERNEL(advance)
