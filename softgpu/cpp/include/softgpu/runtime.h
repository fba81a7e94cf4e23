// Interface between kernels and runner: the state of the running block, the waits of a thread, registration.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "vector_types.h"

namespace softgpu {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Value that a lane publishes to its warp in a warp operation.
struct Exchange { alignas(16) unsigned char bytes[64]; };

enum class WarpOp : uint8_t { Sync, Shuffle, Vote, Reduce, LoadMatrix, MultiplyMatrices };

struct Fiber;
// Runs once, when all lanes of the operation have arrived. `lanes`: fibers of the warp by lane.
using Combine = void (*)(Fiber* lanes);

// One thread of a block.
struct Fiber {
    void* stack_pointer;
    void* stack;
    uint3 thread_index;
    int lane;
    int warp;

    // Warp operation in which this lane waits.
    unsigned mask;
    WarpOp operation;
    Combine combine;

    // Two exchanges, because a lane may reach its next operation before a slower lane has read the results of this one.
    Exchange exchange[2];
    int outgoing;  // index of the exchange for the next operation; the other one holds the last completed operation

    void* to_publish() { return exchange[outgoing].bytes; }
    void* completed() { return exchange[outgoing ^ 1].bytes; }
};

// State of the running block, behind one pointer that the driver's library owns. So the only thread-local data of the
// kernels' library are its __shared__ arrays.
struct Block {
    Fiber* current;
    Fiber* fibers;
    uint3 block_index;
    dim3 block_dim, grid_dim;
    unsigned char* dynamic_shared;
    unsigned existing_lanes;  // of the running warp
};

// Small enough for the static thread-local storage of a library that is opened late. The __shared__ arrays are not, so they
// must use the general model.
extern __thread Block* block __attribute__((tls_model("initial-exec")));

void wait_for_block();
// Returns when every lane in `mask` is in the same operation. completed() then holds the published values.
void wait_for_warp(WarpOp operation, unsigned mask, Combine combine = nullptr);
// Ends the launch with an error and this report.
[[noreturn]] void kernel_error(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Mask of the lanes that exist in the warp of the calling thread.
inline unsigned existing_lanes() { return block->existing_lanes; }

// Value that another lane published in the operation that has just completed.
template <class T> inline T published_by(int lane) {
    T value;
    memcpy(&value, block->fibers[block->current->warp * kWarpSize + lane].completed(), sizeof value);
    return value;
}

struct Kernel {
    const char* name;
    int parameter_count;
    const unsigned* parameter_sizes;
    void (*call)(void** arguments);
};

extern "C" void softgpu_register(const Kernel* kernel);
// `anchor` returns the address of a thread-local variable of the kernels' library, allocating them if need be.
extern "C" void softgpu_register_shared(void* (*anchor)());

template <auto Function> struct Registered;

template <class... Parameters, void (*Function)(Parameters...)> struct Registered<Function> {
    static constexpr unsigned sizes[] = {unsigned(sizeof(Parameters))..., 0};
    Kernel kernel;

    explicit Registered(const char* name) : kernel{name, int(sizeof...(Parameters)), sizes, &call} {
        softgpu_register(&kernel);
    }

    static void call(void** arguments) { call_with(arguments, std::index_sequence_for<Parameters...>{}); }

    template <size_t... Index> static void call_with(void** arguments, std::index_sequence<Index...>) {
        Function(*static_cast<std::remove_const_t<Parameters>*>(arguments[Index])...);
    }
};

}  // namespace softgpu
