// Logits as unmask and top_k_top_p read them: with guidance, without NaN, in vectors of 16 bytes.
#pragma once
#include "memory.cuh"
#include "ptx.cuh"

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exp_approx(float x) { return ex2_approx(x * kLog2e); }

// NaN becomes minus infinity, plus infinity the largest finite value. (fmaxf of a NaN and a number returns the number.)
__device__ __forceinline__ float sanitized(float logit) { return fminf(fmaxf(logit, -INFINITY), FLT_MAX); }

// u + (w + 1) (c - u), in the order of the reference implementations, each operation rounded to f32.
__device__ __forceinline__ float guided(float conditional, float unconditional, float scale) {
  return __fadd_rn(unconditional, __fmul_rn(scale + 1.f, __fsub_rn(conditional, unconditional)));
}

// One logit, with guidance. P: parameter struct with logits, uncond_logits, logits_stride and cfg_scale.
template <class T, class P>
__device__ __forceinline__ float logit_of(const P& p, int64_t row, int token) {
  const int64_t offset = row * p.logits_stride + token;
  float logit = to_float(*at<const T>(p.logits, offset));
  if (p.uncond_logits) logit = guided(logit, to_float(*at<const T>(p.uncond_logits, offset)), p.cfg_scale);
  return sanitized(logit);
}

// kVector<T> logits from token `first` on, in their memory format; minus infinity past the end of the vocabulary.
template <class T>
__device__ __forceinline__ uint4 load_tail(const T* row, int first, int vocab_size) {
  if (first + kVector<T> <= vocab_size) return *reinterpret_cast<const uint4*>(row + first);
  T t[kVector<T>];
#pragma unroll
  for (int j = 0; j < kVector<T>; j++) t[j] = first + j < vocab_size ? row[first + j] : from_float<T>(-INFINITY);
  uint4 bits;
  memcpy(&bits, t, 16);
  return bits;
}

// kVectors vectors of logits, `step` tokens apart. All loads are issued before the first result is used.
template <class T, int kVectors>
__device__ __forceinline__ void load_vectors(const T* row, int first, int step, int vocab_size, uint4 (&bits)[kVectors]) {
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    bits[v] = make_uint4(0, 0, 0, 0);
    if (first + v * step + kVector<T> <= vocab_size) bits[v] = *reinterpret_cast<const uint4*>(row + first + v * step);
  }
  // Vectors past the end of the row, and the vector that contains it.
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    if (first + v * step + kVector<T> > vocab_size) bits[v] = load_tail(row, first + v * step, vocab_size);
  }
}
