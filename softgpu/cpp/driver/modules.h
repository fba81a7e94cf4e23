// Kernels as the driver knows them.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "../include/softgpu/runtime.h"
#include "driver.h"
#include "ptx.h"

namespace softgpu {

// What a function handle points to. Belongs to its module.
struct Function {
    PtxKernel ptx;
    const Kernel* host_kernel = nullptr;  // null if the kernel was not built for the host
    int max_dynamic_shared = kDefaultSharedLimit;  // at the start, what the static arrays leave of it
};

// Whether a library of kernels was loaded.
bool has_host_kernels();

}  // namespace softgpu
