// First include of every kernel file: the ABI, the element types, and the registration of kernels in the CUDA emulator
// (softgpu).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

#include "dllm_kernels.h"

#ifndef SOFTGPU
// The CUDA emulator compiles the same source for the host; there, this macro registers a kernel under its name.
#define SOFTGPU_KERNEL(name)
// Dynamic shared memory, as an array of bytes aligned to 128.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

// Qualifiers of the only parameter of every kernel: one struct of the ABI, by value.
#define DLLM_PARAMS const __grid_constant__
