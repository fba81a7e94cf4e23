// Scheduler of the lanes of a warp. A lane runs until it has to wait and then switches to the next one. When no lane can run,
// the scheduler completes the warp operations whose lanes have all arrived.
#include <cstdio>

#include "fiber.h"
#include "state.h"

namespace softgpu {

static Fiber& take_next_lane(RunnerState& state, Warp& warp) {
    const int rank = __builtin_ctz(warp.ready);
    warp.ready &= warp.ready - 1;
    return warp.lanes[state.lane_of_rank[rank]];
}

// Switches from the running lane directly to the next ready one, without the scheduler.
static void hand_over(RunnerState& state, Fiber& from) {
    Warp& warp = *state.warp;
    if (warp.ready == 0) {
        softgpu_switch(&from.stack_pointer, state.scheduler);
        return;
    }
    Fiber& next = take_next_lane(state, warp);
    state.block.current = &next;
    softgpu_switch(&from.stack_pointer, next.stack_pointer);
}

void fiber_main() {
    RunnerState& state = *runner_state;
    state.kernel->call(state.arguments);
    Fiber& self = *state.block.current;
    state.warp->exited |= 1u << self.lane;
    hand_over(state, self);
    __builtin_unreachable();
}

void wait_for_block() {
    RunnerState& state = *runner_state;
    Fiber& self = *state.block.current;
    state.warp->at_block |= 1u << self.lane;
    hand_over(state, self);
}

void wait_for_warp(WarpOp operation, unsigned mask, Combine combine) {
    RunnerState& state = *runner_state;
    Fiber& self = *state.block.current;
    if (!(mask >> self.lane & 1)) kernel_error("lane %d is not in the mask %#x of its warp operation", self.lane, mask);
    self.operation = operation;
    self.mask = mask;
    self.combine = combine;
    state.warp->at_warp |= 1u << self.lane;
    hand_over(state, self);
}

static const char* operation_name(WarpOp operation) {
    switch (operation) {
        case WarpOp::Sync: return "__syncwarp";
        case WarpOp::Shuffle: return "a shuffle";
        case WarpOp::Vote: return "a vote";
        case WarpOp::Reduce: return "a reduction";
        case WarpOp::LoadMatrix: return "ldmatrix";
        case WarpOp::MultiplyMatrices: return "mma";
    }
    return "?";
}

static unsigned lanes_waiting_with(const Warp& warp, unsigned mask) {
    if (warp.at_warp == mask && mask == kFullMask) {
        // The common case first, without branches: all 32 lanes have arrived, most likely with the same mask.
        unsigned different = 0;
        for (int lane = 0; lane < kWarpSize; lane++) different |= warp.lanes[lane].mask ^ mask;
        if (different == 0) return mask;
    }
    unsigned lanes = 0;
    for (unsigned rest = warp.at_warp; rest != 0; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        if (warp.lanes[lane].mask == mask) lanes |= 1u << lane;
    }
    return lanes;
}

// Reports operations that exchange values with an exited lane, which are undefined on a GPU. __syncwarp ignores exited lanes.
static void check_exited(RunnerState& state, const Warp& warp, Fiber& waiting) {
    const unsigned exited = waiting.mask & warp.exited;
    if (exited == 0 || waiting.operation == WarpOp::Sync) return;
    state.block.current = &waiting;
    kernel_error("the mask %#x of %s names lanes that have exited: %#x", waiting.mask,
                 operation_name(waiting.operation), exited);
}

static void check_same_operation(RunnerState& state, const Warp& warp, unsigned lanes, const Fiber& first) {
    for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
        Fiber& other = warp.lanes[__builtin_ctz(rest)];
        if (other.operation == first.operation && other.combine == first.combine) continue;
        state.block.current = &other;
        kernel_error("lane %d is at %s while lane %d is at %s", first.lane, operation_name(first.operation), other.lane,
                     operation_name(other.operation));
    }
}

static void complete(RunnerState& state, Warp& warp, unsigned lanes, const Fiber& first) {
    if (first.combine != nullptr) first.combine(warp.lanes);
    warp.at_warp &= ~lanes;
    for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        warp.lanes[lane].outgoing ^= 1;
        warp.ready |= 1u << state.rank_of_lane[lane];
    }
}

// Completes every warp operation whose lanes have all arrived. Lanes that never existed count as arrived: the last warp
// of a block may be short.
static bool complete_warp_operations(RunnerState& state, Warp& warp) {
    bool any = false;
    for (unsigned unseen = warp.at_warp; unseen != 0;) {
        Fiber& first = warp.lanes[__builtin_ctz(unseen)];
        const unsigned lanes = lanes_waiting_with(warp, first.mask);
        unseen &= ~lanes;
        check_exited(state, warp, first);
        const unsigned missing = first.mask & warp.exists & ~warp.exited & ~lanes;
        if (missing != 0) continue;
        check_same_operation(state, warp, lanes, first);
        complete(state, warp, lanes, first);
        any = true;
    }
    return any;
}

[[noreturn]] static void report_divergence(RunnerState& state, Warp& warp) {
    Fiber& first = warp.lanes[__builtin_ctz(warp.at_warp)];
    const unsigned lanes = lanes_waiting_with(warp, first.mask);
    const unsigned missing = first.mask & warp.exists & ~warp.exited & ~lanes;
    state.block.current = &first;
    if (missing & warp.at_block) {
        kernel_error("lanes %#x of the warp are at %s with the mask %#x, others at __syncthreads: %#x", lanes,
                     operation_name(first.operation), first.mask, missing & warp.at_block);
    }
    kernel_error("lanes %#x of the warp are at %s with the mask %#x, others in an operation with another mask: %#x",
                 lanes, operation_name(first.operation), first.mask, missing);
}

void run_warp(RunnerState& state, Warp& warp) {
    state.warp = &warp;
    state.block.existing_lanes = warp.exists;
    do {
        if (warp.ready != 0) {
            Fiber& first = take_next_lane(state, warp);
            state.block.current = &first;
            softgpu_switch(&state.scheduler, first.stack_pointer);
        }
    } while (warp.at_warp != 0 && complete_warp_operations(state, warp));
    if (warp.at_warp != 0) report_divergence(state, warp);
}

void release_from_block_barrier(RunnerState& state, Warp& warp) {
    for (unsigned rest = warp.at_block; rest != 0; rest &= rest - 1) {
        warp.ready |= 1u << state.rank_of_lane[__builtin_ctz(rest)];
    }
    warp.at_block = 0;
}

}  // namespace softgpu
