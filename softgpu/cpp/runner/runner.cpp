#include "runner.h"

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <utility>

#include "fiber.h"
#include "state.h"

namespace softgpu {

__thread Block* block __attribute__((tls_model("initial-exec")));
__thread RunnerState* runner_state __attribute__((tls_model("initial-exec")));

// Held by pointer. With the two variables above, all thread-local data of this library uses the initial-exec model, and a
// library that is opened late gets only a few hundred bytes of it.
static RunnerState& thread_state() {
    static thread_local std::unique_ptr<RunnerState> state;
    if (state == nullptr) {
        state = std::make_unique<RunnerState>();
        runner_state = state.get();
        block = &state->block;
    }
    return *state;
}

RunnerState::~RunnerState() {
    for (Fiber& fiber : fibers) free_stack(fiber.stack);
    runner_state = nullptr;
    softgpu::block = nullptr;
}

// xorshift64: fast, and random enough for shuffles.
uint64_t RunnerState::random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

template <class Values> static void shuffle(RunnerState& state, Values& values, size_t count) {
    for (size_t i = count; i > 1; i--) std::swap(values[i - 1], values[state.random() % i]);
}

static void prepare_launch(RunnerState& state, const LaunchShape& shape, const RunOptions& options) {
    const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
    const unsigned warps = (threads + kWarpSize - 1) / kWarpSize;
    while (state.fibers.size() < size_t(warps) * kWarpSize) {
        Fiber fiber{};
        fiber.lane = int(state.fibers.size() % kWarpSize);
        fiber.warp = int(state.fibers.size() / kWarpSize);
        fiber.stack = allocate_stack();
        state.fibers.push_back(fiber);
    }
    state.async_copies.resize(state.fibers.size());
    state.warps.resize(warps);
    state.warp_order.resize(warps);
    for (unsigned i = 0; i < warps; i++) state.warp_order[i] = int(i);
    for (int i = 0; i < kWarpSize; i++) state.lane_of_rank[i] = state.rank_of_lane[i] = uint8_t(i);

    state.block_order.resize(size_t(shape.grid.x) * shape.grid.y * shape.grid.z);
    for (size_t i = 0; i < state.block_order.size(); i++) state.block_order[i] = uint32_t(i);

    state.seed = options.seed;
    state.poison = options.poison;
    state.random_state = options.seed * 0x9e3779b97f4a7c15ull + 1;  // never 0, a fixed point of xorshift
    if (options.seed != 0) shuffle(state, state.block_order, state.block_order.size());

    state.shared.prepare(shape.dynamic_shared_bytes);
    state.block.fibers = state.fibers.data();
    state.block.dynamic_shared = state.shared.dynamic();
    state.block.block_dim = shape.block;
    state.block.grid_dim = shape.grid;
}

static void choose_order(RunnerState& state) {
    if (state.seed == 0) return;
    shuffle(state, state.warp_order, state.warp_order.size());
    shuffle(state, state.lane_of_rank, kWarpSize);
    for (int rank = 0; rank < kWarpSize; rank++) state.rank_of_lane[state.lane_of_rank[rank]] = uint8_t(rank);
}

static void prepare_warp(RunnerState& state, int index, unsigned lanes) {
    Warp& warp = state.warps[size_t(index)];
    warp = Warp{};
    warp.lanes = &state.fibers[size_t(index) * kWarpSize];
    warp.exists = lanes == kWarpSize ? kFullMask : (1u << lanes) - 1;
    for (unsigned lane = 0; lane < lanes; lane++) {
        warp.ready |= 1u << state.rank_of_lane[lane];
        Fiber& fiber = warp.lanes[lane];
        fiber.stack_pointer = prepare_stack(fiber.stack, lane, fiber_main);
    }
}

static void prepare_threads(RunnerState& state, dim3 size) {
    const unsigned threads = size.x * size.y * size.z;
    uint3 index{0, 0, 0};
    for (unsigned i = 0; i < threads; i++) {
        state.fibers[i].thread_index = index;
        if (++index.x == size.x) {
            index.x = 0;
            if (++index.y == size.y) index.y = 0, index.z++;
        }
    }
    for (AsyncCopies& copies : state.async_copies) {
        copies.pending.clear();
        copies.open_group = 0;
    }
    for (size_t warp = 0; warp < state.warps.size(); warp++) {
        const unsigned left = threads - unsigned(warp) * kWarpSize;
        prepare_warp(state, int(warp), left < kWarpSize ? left : kWarpSize);
    }
}

// Runs a block from barrier to barrier until every thread has exited. Exited threads count as arrived.
static void run_block(RunnerState& state) {
    bool any_alive = true;
    while (any_alive) {
        for (int index : state.warp_order) run_warp(state, state.warps[size_t(index)]);
        any_alive = false;
        for (Warp& warp : state.warps) {
            any_alive |= warp.at_block != 0;
            release_from_block_barrier(state, warp);
        }
    }
}

static void run_grid(RunnerState& state, const LaunchShape& shape, const RunOptions& options) {
    const dim3 grid = shape.grid;
    for (uint32_t index : state.block_order) {
        state.block.block_index = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
        if (options.poison) state.shared.poison(options.uses_static_shared);
        choose_order(state);
        prepare_threads(state, shape.block);
        run_block(state);
    }
}

void run_kernel(const Kernel& kernel, void** arguments, const LaunchShape& shape, const RunOptions& options,
                Outcome* outcome) {
    RunnerState& state = thread_state();
    state.kernel = &kernel;
    state.arguments = arguments;
    state.outcome = outcome;
    prepare_launch(state, shape, options);
    // A failing kernel jumps back here from any fiber, so no local variable below may have a destructor.
    if (sigsetjmp(state.leave, 0) == 0) {
        state.active = true;
        run_grid(state, shape, options);
    }
    state.active = false;
}

bool in_kernel() { return runner_state != nullptr && runner_state->active; }

[[noreturn]] static void leave_kernel(RunnerState& state, Problem problem) {
    state.active = false;
    state.outcome->problem = problem;
    state.outcome->block_index = state.block.block_index;
    state.outcome->thread_index = state.block.current->thread_index;
    siglongjmp(state.leave, 1);
}

void stop_kernel_at(void* address, int signal_number) {
    RunnerState& state = *runner_state;
    state.outcome->address = address;
    state.outcome->signal_number = signal_number;
    leave_kernel(state, Problem::Fault);
}

static void stop_kernel_with(Problem problem, const char* format, va_list arguments) {
    RunnerState& state = *runner_state;
    vsnprintf(state.outcome->message, sizeof state.outcome->message, format, arguments);
    leave_kernel(state, problem);
}

void stop_kernel(Problem problem, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    stop_kernel_with(problem, format, arguments);
    __builtin_unreachable();
}

void kernel_error(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    stop_kernel_with(Problem::Other, format, arguments);
    __builtin_unreachable();
}

const char* describe_runner_address(const void* address) {
    if (runner_state == nullptr) return nullptr;
    if (runner_state->shared.is_behind_dynamic(address)) return "behind the dynamic shared memory";
    for (const Fiber& fiber : runner_state->fibers) {
        const char* stack = static_cast<const char*>(fiber.stack);
        if (address >= stack && address < stack + kGuardBytes) return "the end of the thread's stack (64 KiB here)";
    }
    return nullptr;
}

}  // namespace softgpu
