// What a CUDA source file needs in order to compile for the host and run on the software device.
//
// The build passes this file to the compiler ahead of every kernel file, with SOFTGPU defined. Kernels may rely on what
// is declared here and in the headers below, and on nothing else: an intrinsic that is missing is a compile error.
#pragma once

// The standard library comes first: some of its headers use names that are macros further down.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))

// All threads of a block run on one host thread, and each host thread that launches runs blocks of its own. Thread-
// local storage is therefore exactly what a block shares; the device finds it all in one place and refills it for
// every block.
#define __shared__ static __thread

#include "vector_types.h"

#include "softgpu/runtime.h"

#include "softgpu/async_copy.h"
#include "softgpu/atomics.h"
#include "softgpu/math.h"
#include "softgpu/matrix.h"
#include "softgpu/warp.h"

#include "cuda_bf16.h"
#include "cuda_fp16.h"

#define threadIdx (::softgpu::block->current->thread_index)
#define blockIdx (::softgpu::block->block_index)
#define blockDim (::softgpu::block->block_dim)
#define gridDim (::softgpu::block->grid_dim)
constexpr int warpSize = softgpu::kWarpSize;

// Dynamic shared memory, as bytes aligned to 128. The page behind it faults.
#define DYNAMIC_SHARED(name) unsigned char* const name = ::softgpu::block->dynamic_shared

// Makes a kernel known under its name. Count and sizes of its parameters are taken from its signature.
#define SOFTGPU_KERNEL(name) static const ::softgpu::Registered<&name> softgpu_registered_##name(#name);

inline void __syncthreads() { softgpu::wait_for_block(); }

// Blocks run one after another and the threads of a block take turns: every store is seen at once, so a missing fence
// cannot show here.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
