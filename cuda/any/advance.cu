// advance: what the decoding rules do between two passes; the last kernel of a step. src/oracle/advance.rs says what.
//
// grid    1 block, of which a warp owns one sequence after the other
// block   512 threads
// phases  1. each warp: counts masks, looks for an end-of-text token, writes quota, commit_before, steps and the sequence
//         2. one thread: counters, the first failure; then the host's word, behind a fence for the whole system
// shared  the reductions' 128 bytes
// bytes   a sequence: 64 of its state, 8 read and 12 written of unmask's, and 4 a position looked at
// bound   by latency: control and sequence, tokens (128 positions of a sequence at a time), stores, the fence across the bus
//
// Numbers in device memory may be anything: ranges are brought to within the tokens, counters wrap, nothing divides by zero.
#include "memory.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kAtOnce = 4;  // loads of a lane under way together
constexpr int kRound = kAtOnce * kWarp;
constexpr int kNone = 0x7fffffff;

// What a thread has seen; only the first lane of a warp counts.
struct Seen {
  int took_part = 0;
  int go_on = 0;
  int failed = kNone;  // the lowest sequence
};

__device__ __forceinline__ int one_more(int x) { return int(uint32_t(x) + 1u); }
__device__ __forceinline__ int within(int x, int least, int most) { return max(least, min(x, most)); }

// The next tokens of a warp's range, of which `count` are left; `otherwise` behind its end.
__device__ __forceinline__ void load_tokens(const int32_t* tokens, int count, int otherwise, int (&token)[kAtOnce]) {
#pragma unroll
  for (int i = 0; i < kAtOnce; i++) {
    const int position = i * kWarp + int(threadIdx.x % kWarp);
    token[i] = position < count ? tokens[position] : otherwise;
  }
}

// Masks among `count` tokens; the same in all lanes.
__device__ __forceinline__ int count_masks(const int32_t* tokens, int count, int mask_token) {
  int masks = 0;
  for (; count > 0; count -= kRound, tokens += kRound) {
    int token[kAtOnce];
    load_tokens(tokens, count, ~mask_token, token);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) masks += token[i] == mask_token;
  }
  return warp_reduce(masks, Sum());
}

// Whether an end-of-text token stands among `count` tokens with no mask before it; the same in all lanes.
__device__ __forceinline__ bool ends(const dllm_advance_params& p, const int32_t* tokens, int count) {
  for (; count > 0; count -= kRound, tokens += kRound) {
    int token[kAtOnce];
    load_tokens(tokens, count, p.mask_token, token);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
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

// How many tokens a sequence may commit in a pass, when so many masks are left in its reach.
__device__ __forceinline__ int quota_of(const dllm_advance_params& p, const dllm_advance_control& control,
                                        const dllm_advance_sequence& sequence, int pass, int masks) {
  switch (control.schedule) {
    case DLLM_SCHEDULE_LLADA: {
      if (control.steps <= 0 || pass >= control.steps) return 1;
      const int masked = max(0, sequence.initial_masks);
      return masked / control.steps + (pass < masked % control.steps);
    }
    case DLLM_SCHEDULE_DREAM: {
      const int num_ratios = within(control.num_ratios, 0, p.max_ratios);
      if (pass < 0 || pass >= num_ratios - 1) return masks;
      const float share = fmaxf(float(masks) * at<const float>(p.ratios)[pass], 0.f);
      return share < float(masks) ? int(share) : masks;
    }
    case DLLM_SCHEDULE_CARRY_OVER: {
      const int per_step = within(sequence.per_step, 0, masks);
      return per_step + within(sequence.deficit, 0, masks - per_step);
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

// Phase 1, one warp: a sequence.
__device__ __forceinline__ void advance_sequence(const dllm_advance_params& p, const dllm_advance_control& control, int s,
                                                 Seen& seen) {
  dllm_advance_sequence* place = at<dllm_advance_sequence>(p.sequences) + s;
  dllm_advance_sequence sequence = load_sequence(reinterpret_cast<const uint4*>(place));
  const bool took_part = sequence.active;
  bool failed = false;
  int quota = 0, commit_before = int(0x80000000u);  // no position is before it, whatever the policy does with the quota
  if (took_part) {
    const int old_quota = max(0, at<const int32_t>(p.quota)[s]);
    const int rejected = old_quota - within(at<const int32_t>(p.committed)[s], 0, old_quota);
    failed = at<const int32_t>(p.failed)[s] != DLLM_NONE_FAILED;
    const int first = within(sequence.first_token, 0, p.num_tokens);
    const int length = within(sequence.length, 0, p.num_tokens - first);
    const int32_t* tokens = at<const int32_t>(p.tokens, first);
    const auto masks = [&](int start, int end) {
      start = within(start, 0, length);
      return count_masks(tokens + start, within(end, start, length) - start, p.mask_token);
    };

    const int pass = one_more(control.pass);
    sequence.forwards = one_more(sequence.forwards);
    if (p.num_end_tokens > 0) {
      const int generated = within(sequence.generated, 0, length);
      sequence.ended = ends(p, tokens + generated, length - generated);
    }
    if (control.schedule == DLLM_SCHEDULE_CARRY_OVER) {
      sequence.deficit = rejected;
      if (pass >= sequence.max_passes && rejected > 0) {
        sequence.max_passes = one_more(sequence.max_passes);
        sequence.per_step = 0;
      }
    }
    sequence.active = !failed && !sequence.ended && pass < sequence.max_passes && masks(sequence.active_start, sequence.active_end) > 0;
    if (sequence.active) {
      const bool counts = control.schedule == DLLM_SCHEDULE_DREAM || control.schedule == DLLM_SCHEDULE_CARRY_OVER;
      quota = quota_of(p, control, sequence, pass, counts ? masks(sequence.quota_start, sequence.quota_end) : 0);
      commit_before = sequence.commit_before;
    }
  }
  __syncwarp();  // all lanes have read what the first overwrites
  if (threadIdx.x % kWarp > 0) return;
  at<int32_t>(p.quota)[s] = quota;
  at<int32_t>(p.commit_before)[s] = commit_before;
  at<int32_t>(p.steps)[s] = sequence.forwards;
  if (!took_part) return;
  place->per_step = sequence.per_step;
  place->deficit = sequence.deficit;
  place->max_passes = sequence.max_passes;
  place->forwards = sequence.forwards;
  place->active = sequence.active;
  place->ended = sequence.ended;
  seen.took_part++;
  seen.go_on += sequence.active;
  if (failed) seen.failed = min(seen.failed, s);
}

// Phase 2, one thread. The host must find all of a launch once it finds its number.
__device__ __forceinline__ void tell_host(const dllm_advance_control& control, int active, dllm_progress* progress) {
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
  Seen seen;
  for (int s = threadIdx.x / kWarp; s < p.num_sequences; s += kWarps) advance_sequence(p, control, s, seen);
  const int took_part = block_reduce<kThreads>(seen.took_part, 0, Sum());
  const int go_on = block_reduce<kThreads>(seen.go_on, 0, Sum());
  const int failed = -block_reduce<kThreads>(-seen.failed, -kNone, Max());
  if (threadIdx.x > 0) return;
  control.pass = one_more(control.pass);
  control.passes = one_more(control.passes);
  if (took_part > 0) control.nfe = one_more(control.nfe);
  if (failed != kNone && control.failed_sequence == DLLM_NONE_FAILED) {
    control.failed_sequence = failed;
    control.failed_position = at<const int32_t>(p.failed)[failed];
    control.failed_step = int(uint32_t(at<const dllm_advance_sequence>(p.sequences)[failed].forwards) - 1u);
  }
  *at<dllm_advance_control>(p.control) = control;
  tell_host(control, go_on, at<dllm_progress>(p.progress));
}
SOFTGPU_KERNEL(advance)
