// Common declarations of the driver: result codes, options, reports.
//
// No header of NVIDIA is used: a device pointer is a uint64_t, a handle a void*, a result an int.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#define DRIVER_API extern "C" __attribute__((visibility("default")))

namespace softgpu {

using DevicePtr = uint64_t;

// Rust reads results as an enum, for which any other number is undefined behaviour. Return only these.
enum Result : int {
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNotInitialized = 3,
    kInvalidDevice = 101,
    kInvalidContext = 201,
    kNoBinaryForGpu = 209,
    kInvalidPtx = 218,
    kUnsupportedPtxVersion = 222,
    kInvalidHandle = 400,
    kIllegalState = 401,
    kNotFound = 500,
    kNotReady = 600,
    kIllegalAddress = 700,
    kMisalignedAddress = 716,
    kLaunchFailed = 719,
    kNotSupported = 801,
    kCaptureUnsupported = 900,
    kCaptureInvalidated = 901,
    kCaptureUnmatched = 903,
    kCaptureUnjoined = 904,
    kCaptureIsolation = 905,
    kCapturedEvent = 907,
    kCaptureWrongThread = 908,
};

// Adds a line to the calling thread's report, prints it unless the thread is quiet, and returns `code`.
Result fail(Result code, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Line that the thread's last `fail` added.
const char* last_failure();

// Same numbers as `Opt` in src/lib.rs.
enum class Option : int {
    Seed = 0,
    FailAlloc = 1,
    Poison = 2,
    Align = 3,
    Guard = 4,
    Quiet = 5,
    Launches = 6,
    BlockingCalls = 7,
    Lazy = 8,
    ComputeCapability = 9,
    TotalMemory = 10,
    MaxPtx = 11,
    UsedMemory = 12,
    LiveAllocations = 13,
    FailKernel = 14,
    LaunchCalls = 15,
    Multiprocessors = 16,
};

struct ThreadOptions {
    int64_t seed;
    int64_t fail_alloc = -1;  // number of allocations that succeed before one fails; negative: none fails
    int64_t poison = 1;
    int64_t align = 16;
    int64_t guard = 1;
    int64_t quiet = 0;
    int64_t launches = 0;
    int64_t launch_calls = 0;
    int64_t fail_kernel = -1;  // number of kernels that run before one fails; negative: none fails
    int64_t blocking_calls = 0;
    ThreadOptions();
};

struct ProcessOptions {
    std::atomic<int64_t> lazy{0};
    std::atomic<int64_t> compute_capability{90};
    std::atomic<int64_t> total_memory{int64_t(8) << 30};
    std::atomic<int64_t> max_ptx{90};
    std::atomic<int64_t> used_memory{0};
    std::atomic<int64_t> live_allocations{0};
    std::atomic<int64_t> multiprocessors{132};
    std::atomic<int64_t> default_seed{0};
    std::atomic<int> cuda_version{13000};  // of the driver
};

ThreadOptions& thread_options();
extern ProcessOptions process_options;

// Counts a call in which the host waits for the device.
inline void count_blocking_call() { thread_options().blocking_calls++; }

Result require_context();

// Maximum dynamic shared memory that a block may request, in bytes.
int shared_memory_opt_in_limit();
constexpr int kDefaultSharedLimit = 48 << 10;

}  // namespace softgpu
