// Declarations with which a CUDA source file compiles for the host and runs on the CUDA emulator.
//
// The build includes this file before every kernel file, with SOFTGPU defined. Kernels may use only the declarations here and
// in the headers below: a missing intrinsic is a compile error.
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

// All threads of a block run on one host thread, and each launching host thread runs its own blocks. So thread-local storage
// is shared by exactly one block. The emulator finds all of it in one place and refills it for every block.
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

// Dynamic shared memory, as bytes aligned to 128. A guard page follows it.
#define DYNAMIC_SHARED(name) unsigned char* const name = ::softgpu::block->dynamic_shared

// Registers a kernel under its name. The number and sizes of its parameters come from its signature.
#define SOFTGPU_KERNEL(name) static const ::softgpu::Registered<&name> softgpu_registered_##name(#name);

inline void __syncthreads() { softgpu::wait_for_block(); }

// Blocks run one after another and the threads of a block take turns. Every store is visible at once, so a missing fence
// cannot show here.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
