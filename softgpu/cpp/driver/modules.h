// Kernels of loaded modules.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "../include/softgpu/runtime.h"
#include "driver.h"
#include "ptx.h"

namespace softgpu {

// Target of a function handle. Its module owns it.
struct Function {
    PtxKernel ptx;
    const Kernel* host_kernel = nullptr;  // null if the kernel was not built for the host
    int max_dynamic_shared = kDefaultSharedLimit;  // initially the limit minus the static arrays
};

// Whether a library of kernels is loaded.
bool has_host_kernels();

}  // namespace softgpu
