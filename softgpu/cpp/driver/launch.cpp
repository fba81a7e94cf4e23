// Launches: limits, arguments, and errors of kernels.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "../runner/runner.h"
#include "memory.h"
#include "modules.h"
#include "streams.h"

namespace softgpu {

namespace {

// Arguments of one launch, copied at the call: a captured graph owns its own copy.
class Arguments {
  public:
    Arguments(const Kernel& kernel, void** parameters) : kernel_(kernel) {
        for (int i = 0; i < kernel.parameter_count; i++) {
            const unsigned bytes = kernel.parameter_sizes[i];
            values_.emplace_back((bytes + 15) / 16 * 2);  // words, so that any alignment up to 16 holds
            memcpy(values_.back().data(), parameters[i], bytes);
        }
    }

    // Every word that looks like a device address must point into live memory.
    Result check_pointers() const {
        for (size_t i = 0; i < values_.size(); i++) {
            const unsigned words = kernel_.parameter_sizes[i] / 8;
            for (unsigned word = 0; word < words; word++) {
                std::string what;
                if (!is_dangling(values_[i][word], &what)) continue;
                return fail(kIllegalAddress, "%s: argument %zu, byte %u: points into %s", kernel_.name, i, word * 8,
                            what.c_str());
            }
        }
        return kSuccess;
    }

    std::vector<void*> pointers() {
        std::vector<void*> pointers;
        for (auto& value : values_) pointers.push_back(value.data());
        return pointers;
    }

  private:
    const Kernel& kernel_;
    std::vector<std::vector<uint64_t>> values_;
};

Result check_limits(const Function& function, const LaunchShape& shape) {
    const dim3 grid = shape.grid, block = shape.block;
    const char* name = function.ptx.name.c_str();
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    const bool grid_fits = grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffff && grid.y <= 65535 &&
                           grid.z <= 65535;
    if (!grid_fits) return fail(kInvalidValue, "%s: a grid of %u x %u x %u blocks", name, grid.x, grid.y, grid.z);
    const bool block_fits = threads >= 1 && block.x <= 1024 && block.y <= 1024 && block.z <= 64;
    if (!block_fits || threads > function.ptx.max_threads) {
        return fail(kInvalidValue, "%s: a block of %u x %u x %u threads, of which there may be %u", name, block.x,
                    block.y, block.z, function.ptx.max_threads);
    }
    if (shape.dynamic_shared_bytes > size_t(function.max_dynamic_shared)) {
        return fail(kInvalidValue, "%s: %zu bytes of dynamic shared memory, and the limit is set to %d", name,
                    shape.dynamic_shared_bytes, function.max_dynamic_shared);
    }
    return kSuccess;
}

std::string describe_fault(const Outcome& outcome) {
    char text[256];
    if (outcome.signal_number == SIGFPE) return "integer division by zero or overflow";
    const char* runner_part = describe_runner_address(outcome.address);
    snprintf(text, sizeof text, "touched %p: %s", outcome.address,
             runner_part != nullptr ? runner_part : describe_address(outcome.address).c_str());
    return text;
}

Result report_problem(const Kernel& kernel, const Outcome& outcome) {
    const uint3 b = outcome.block_index, t = outcome.thread_index;
    const bool fault = outcome.problem == Problem::Fault;
    const std::string what = fault ? describe_fault(outcome) : outcome.message;
    const Result code = outcome.problem == Problem::Misaligned                  ? kMisalignedAddress
                        : fault && outcome.signal_number != SIGFPE ? kIllegalAddress
                                                                   : kLaunchFailed;
    return fail(code, "%s: block (%u,%u,%u) thread (%u,%u,%u): %s", kernel.name, b.x, b.y, b.z, t.x, t.y, t.z,
                what.c_str());
}

Result run_launch(const Kernel& kernel, Arguments& arguments, const LaunchShape& shape, bool uses_static_shared) {
    if (Result error = arguments.check_pointers()) return error;
    ThreadOptions& options = thread_options();
    options.launches++;
    if (options.fail_kernel >= 0 && options.fail_kernel-- == 0) {
        return fail(kIllegalAddress, "%s: failed on request", kernel.name);
    }
    auto pointers = arguments.pointers();
    Outcome outcome;
    run_kernel(kernel, pointers.data(), shape, {uint64_t(options.seed), options.poison != 0, uses_static_shared},
               &outcome);
    return outcome.problem == Problem::None ? kSuccess : report_problem(kernel, outcome);
}

Result launch(const Function& function, const LaunchShape& shape, void* stream, void** parameters) {
    thread_options().launch_calls++;
    if (Result error = require_context()) return error;
    if (Result error = check_limits(function, shape)) return error;
    const Kernel* kernel = function.host_kernel;
    if (kernel == nullptr) return fail(kNotSupported, "%s was not built for the host", function.ptx.name.c_str());
    auto arguments = std::make_shared<Arguments>(*kernel, parameters);
    const bool uses_static_shared = function.ptx.static_shared_bytes > 0;
    return submit(stream, NodeType::Kernel,
                  [=] { return run_launch(*kernel, *arguments, shape, uses_static_shared); });
}

// CUlaunchConfig and CUlaunchAttribute
struct LaunchAttribute {
    int id;
    char padding[4];
    union {
        char bytes[64];
        struct { unsigned x, y, z; } cluster;
    } value;
};

struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, dynamic_shared_bytes;
    void* stream;
    const LaunchAttribute* attributes;
    unsigned attribute_count;
};

enum { kCooperative = 2, kClusterDimension = 4, kProgrammaticEvent = 7, kCompletionEvent = 12 };

// Most attributes concern speed or order and are ignored. Requests for unsupported features are refused.
Result check_attribute(const char* name, const LaunchAttribute& attribute) {
    const auto& cluster = attribute.value.cluster;
    switch (attribute.id) {
        case kCooperative:
            if (attribute.value.bytes[0] == 0) return kSuccess;
            return fail(kNotSupported, "%s: cooperative launch: blocks run one after another here", name);
        case kClusterDimension:
            if (cluster.x == 1 && cluster.y == 1 && cluster.z == 1) return kSuccess;
            return fail(kNotSupported, "%s: clusters of %u x %u x %u blocks", name, cluster.x, cluster.y, cluster.z);
        case kProgrammaticEvent:
        case kCompletionEvent: return fail(kNotSupported, "%s: launch attribute %d", name, attribute.id);
        default: return kSuccess;
    }
}

}  // namespace

}  // namespace softgpu

using namespace softgpu;

DRIVER_API Result cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                 unsigned block_y, unsigned block_z, unsigned dynamic_shared_bytes, void* stream,
                                 void** parameters, void**) {
    const LaunchShape shape{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, dynamic_shared_bytes};
    return launch(*static_cast<const Function*>(function), shape, stream, parameters);
}

DRIVER_API Result cuLaunchKernelEx(const LaunchConfig* config, void* handle, void** parameters, void**) {
    const auto& function = *static_cast<const Function*>(handle);
    for (unsigned i = 0; i < config->attribute_count; i++) {
        if (Result error = check_attribute(function.ptx.name.c_str(), config->attributes[i])) return error;
    }
    const LaunchShape shape{{config->grid_x, config->grid_y, config->grid_z},
                            {config->block_x, config->block_y, config->block_z},
                            config->dynamic_shared_bytes};
    return launch(function, shape, config->stream, parameters);
}

DRIVER_API Result cuLaunchCooperativeKernel(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                            unsigned, void*, void**) {
    return fail(kNotSupported, "%s: cooperative launch: blocks run one after another here",
                static_cast<const Function*>(function)->ptx.name.c_str());
}

// From threads and shared memory; registers are unknown here.
DRIVER_API Result cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* handle, int block_size,
                                                                       size_t dynamic_shared_bytes, unsigned) {
    const auto& function = *static_cast<const Function*>(handle);
    if (block_size <= 0) return fail(kInvalidValue, "occupancy of blocks of %d threads", block_size);
    constexpr size_t kSystemBytes = 1024;  // of shared memory, for each block
    const size_t shared_bytes = dynamic_shared_bytes + function.ptx.static_shared_bytes + kSystemBytes;
    const int by_threads = block_size > int(function.ptx.max_threads) ? 0 : 2048 / block_size;
    const int by_shared = int((size_t(shared_memory_opt_in_limit()) + kSystemBytes) / shared_bytes);
    *blocks = std::min({by_threads, by_shared, 32});
    return kSuccess;
}

DRIVER_API Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int block_size,
                                                              size_t dynamic_shared_bytes) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, block_size, dynamic_shared_bytes, 0);
}
