// Logits as unmask and cut read them: guided, without NaN, in pieces of 16 bytes.
#pragma once
#include "memory.cuh"
#include "ptx.cuh"

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exp_of(float x) { return ex2_approx(x * kLog2e); }

// NaN counts as minus infinity, plus infinity as the largest finite value.
__device__ __forceinline__ float sanitized(float logit) { return logit == logit ? fminf(logit, FLT_MAX) : -INFINITY; }

// u + (w + 1) (c - u), in the order of the originals and with their roundings.
__device__ __forceinline__ float guided(float conditional, float unconditional, float scale) {
  return __fadd_rn(unconditional, __fmul_rn(scale + 1.f, __fsub_rn(conditional, unconditional)));
}

// One logit. P is the parameters of an op that has logits, uncond_logits, logits_stride and cfg_scale.
template <class T, class P>
__device__ __forceinline__ float logit_of(const P& p, int64_t row, int token) {
  const int64_t offset = row * p.logits_stride + token;
  float logit = to_float(*at<const T>(p.logits, offset));
  if (p.uncond_logits) logit = guided(logit, to_float(*at<const T>(p.uncond_logits, offset)), p.cfg_scale);
  return sanitized(logit);
}

// kVector<T> logits from token `first` on, as they lie in memory; beyond the vocabulary, minus infinity.
template <class T>
__device__ __forceinline__ uint4 load_end(const T* row, int first, int vocab_size) {
  if (first + kVector<T> <= vocab_size) return *reinterpret_cast<const uint4*>(row + first);
  T t[kVector<T>];
#pragma unroll
  for (int j = 0; j < kVector<T>; j++) t[j] = first + j < vocab_size ? row[first + j] : from_float<T>(-INFINITY);
  uint4 bits;
  memcpy(&bits, t, 16);
  return bits;
}
template <class T, class P>
__device__ __forceinline__ Vector<T> logits_of(const P& p, int64_t row, int first) {
  const int64_t offset = row * p.logits_stride;
  Vector<T> logits = Vector<T>::unpack(load_end(at<const T>(p.logits, offset), first, p.vocab_size));
  if (p.uncond_logits) {
    const Vector<T> other = Vector<T>::unpack(load_end(at<const T>(p.uncond_logits, offset), first, p.vocab_size));
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) logits.x[j] = guided(logits.x[j], other.x[j], p.cfg_scale);
  }
#pragma unroll
  for (int j = 0; j < kVector<T>; j++) logits.x[j] = sanitized(logits.x[j]);
  return logits;
}
