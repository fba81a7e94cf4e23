// State shared by the parts of the runner: everything about the kernel that runs on the calling host thread.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <vector>

#include "../include/softgpu/runtime.h"
#include "runner.h"
#include "shared_memory.h"

namespace softgpu {

// State of the lanes of a warp, as masks. A lane that runs or may run is in none of at_block, at_warp and exited.
struct Warp {
    Fiber* lanes;
    unsigned exists;     // lanes that the block has; the last warp may have fewer than 32
    unsigned exited;
    unsigned at_block;   // in __syncthreads
    unsigned at_warp;    // in a warp operation
    unsigned ready;      // bit r: the lane of rank r (see RunnerState::lane_of_rank) may run
};

struct AsyncCopy {
    void* destination;
    const void* source;
    uint8_t bytes, source_bytes;
    bool is_read;                         // true: the source was read at issue; false: it is read when the copy lands
    unsigned group;
    alignas(16) unsigned char data[16];
};

// Copies in flight of one thread.
struct AsyncCopies {
    std::vector<AsyncCopy> pending;
    unsigned open_group = 0;
};

struct RunnerState {
    Block block{};
    const Kernel* kernel = nullptr;
    void** arguments = nullptr;
    bool active = false;
    sigjmp_buf leave;
    Outcome* outcome = nullptr;

    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<AsyncCopies> async_copies;  // by fiber
    SharedMemory shared;
    uint64_t seed = 0;
    bool poison = true;

    // Order of blocks, warps and lanes.
    uint64_t random_state = 0;
    std::vector<uint32_t> block_order;
    std::vector<int> warp_order;
    uint8_t lane_of_rank[kWarpSize];
    uint8_t rank_of_lane[kWarpSize];

    // The warp whose lanes run, and the stack to return to when none of them can run.
    Warp* warp = nullptr;
    void* scheduler = nullptr;

    ~RunnerState();
    uint64_t random();
};

// Null on a thread that never ran a kernel; readable from a signal handler.
extern __thread RunnerState* runner_state __attribute__((tls_model("initial-exec")));

// Runs the lanes of a warp until all that have not exited are in __syncthreads.
void run_warp(RunnerState& state, Warp& warp);
void release_from_block_barrier(RunnerState& state, Warp& warp);
void fiber_main();

}  // namespace softgpu
