// Part of the library of kernels: lets the emulator find the thread-local block that holds all its __shared__ arrays.
#include "softgpu.h"

static void* shared_anchor() {
    static __thread char anchor;
    return &anchor;
}

__attribute__((constructor)) static void register_shared() { softgpu::softgpu_register_shared(&shared_anchor); }
