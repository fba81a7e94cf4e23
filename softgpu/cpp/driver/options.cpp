// Options, reports, and their environment variables.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "driver.h"
#include "start.h"

namespace softgpu {

ProcessOptions process_options;

ThreadOptions::ThreadOptions() : seed(process_options.default_seed) {}

ThreadOptions& thread_options() {
    static thread_local ThreadOptions options;
    return options;
}

static thread_local std::string pending_report, last_line;

const char* last_failure() { return last_line.c_str(); }

Result fail(Result code, const char* format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    // Also printed at once: an error in a destructor reaches the caller only with a later, unrelated call.
    if (!thread_options().quiet) fprintf(stderr, "softgpu: %s\n", line);
    write_report(line);
    last_line = line;
    pending_report += last_line;
    pending_report += '\n';
    return code;
}

static int64_t* thread_option(Option option) {
    ThreadOptions& options = thread_options();
    switch (option) {
        case Option::Seed: return &options.seed;
        case Option::FailAlloc: return &options.fail_alloc;
        case Option::Poison: return &options.poison;
        case Option::Align: return &options.align;
        case Option::Guard: return &options.guard;
        case Option::Quiet: return &options.quiet;
        case Option::Launches: return &options.launches;
        case Option::LaunchCalls: return &options.launch_calls;
        case Option::FailKernel: return &options.fail_kernel;
        case Option::BlockingCalls: return &options.blocking_calls;
        default: return nullptr;
    }
}

static std::atomic<int64_t>* process_option(Option option) {
    switch (option) {
        case Option::Lazy: return &process_options.lazy;
        case Option::ComputeCapability: return &process_options.compute_capability;
        case Option::TotalMemory: return &process_options.total_memory;
        case Option::MaxPtx: return &process_options.max_ptx;
        case Option::Multiprocessors: return &process_options.multiprocessors;
        case Option::UsedMemory: return &process_options.used_memory;
        case Option::LiveAllocations: return &process_options.live_allocations;
        default: return nullptr;
    }
}

// Reads a variable of the form 9.0, with weights for both parts; 0 if it is not set.
static int version_in(const char* variable, int major_weight, int minor_weight) {
    const char* text = getenv(variable);
    if (text == nullptr) return 0;
    int major = 0, minor = 0;
    if (sscanf(text, "%d.%d", &major, &minor) != 2) {
        fprintf(stderr, "softgpu: %s=%s is not of the form 9.0\n", variable, text);
        abort();
    }
    return major * major_weight + minor * minor_weight;
}

void read_environment() {
    if (const char* seed = getenv("SOFTGPU_SEED")) process_options.default_seed = atoll(seed);
    if (const char* lazy = getenv("SOFTGPU_LAZY")) process_options.lazy = atoll(lazy);
    if (const int capability = version_in("SOFTGPU_CC", 10, 1)) process_options.compute_capability = capability;
    if (const int version = version_in("SOFTGPU_CUDA", 1000, 10)) process_options.cuda_version = version;
}

}  // namespace softgpu

using namespace softgpu;

DRIVER_API int softgpu_set(int option, int64_t value) {
    if (int64_t* place = thread_option(Option(option))) {
        *place = value;
        return 0;
    }
    if (std::atomic<int64_t>* place = process_option(Option(option))) {
        *place = value;
        return 0;
    }
    return 1;
}

DRIVER_API int64_t softgpu_get(int option) {
    if (int64_t* place = thread_option(Option(option))) return *place;
    if (std::atomic<int64_t>* place = process_option(Option(option))) return *place;
    return -1;
}

// Takes the calling thread's report. The text is valid until the thread's next call.
DRIVER_API const char* softgpu_report() {
    static thread_local std::string taken;
    taken.swap(pending_report);
    pending_report.clear();
    return taken.c_str();
}
