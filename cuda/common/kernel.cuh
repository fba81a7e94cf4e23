// What every kernel file includes first: the ABI, the element types, and the line that makes a kernel known to the
// software device of the tests.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

#include "dllm_kernels.h"

#ifndef SOFTGPU
// The software device runs the same source on the host; there, this registers a kernel under its name.
#define SOFTGPU_KERNEL(name)
// Dynamic shared memory, as an array of bytes aligned to 128.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

// The only parameter of every kernel: one struct of the ABI, by value.
#define DLLM_PARAMS const __grid_constant__
