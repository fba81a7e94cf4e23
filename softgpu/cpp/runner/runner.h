// Runs one kernel over its grid on the calling host thread. The threads of a block are fibers that take turns.
#pragma once
#include <csignal>
#include <cstdint>

#include "../include/softgpu/runtime.h"

namespace softgpu {

enum class Problem { None, Fault, Misaligned, Other };

struct LaunchShape {
    dim3 grid, block;
    size_t dynamic_shared_bytes;
};

struct RunOptions {
    uint64_t seed;        // 0: blocks, warps and lanes in their natural order
    bool poison;          // fill shared memory with NaN before each block
    bool uses_static_shared;
};

// Outcome of a kernel. After a problem: the block and the thread that caused it.
struct Outcome {
    Problem problem = Problem::None;
    char message[512] = "";     // Misaligned, Other
    void* address = nullptr;    // Fault
    int signal_number = 0;      // Fault
    uint3 block_index{}, thread_index{};
};

void run_kernel(const Kernel& kernel, void** arguments, const LaunchShape& shape, const RunOptions& options,
                Outcome* outcome);

// For signal handlers: whether this host thread is inside a kernel, and a way to leave it.
bool in_kernel();
[[noreturn]] void stop_kernel_at(void* address, int signal_number);
[[noreturn]] void stop_kernel(Problem problem, const char* format, ...) __attribute__((format(printf, 2, 3)));

// For reports: describes an address of the runner, such as the page after dynamic shared memory. Null for other addresses.
const char* describe_runner_address(const void* address);

}  // namespace softgpu
