// Initialisation, the one device, and contexts.
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include "driver.h"
#include "start.h"

namespace softgpu {

static std::atomic<bool> initialized{false};
static int primary_context;  // its address serves as the handle
static thread_local std::vector<void*> context_stack;

static void* current_context() { return context_stack.empty() ? nullptr : context_stack.back(); }

Result require_context() {
    if (!initialized) return fail(kNotInitialized, "cuInit was not called");
    if (current_context() == nullptr) return fail(kInvalidContext, "no context is current on this thread");
    return kSuccess;
}

static Result check_device(int device) {
    if (!initialized) return fail(kNotInitialized, "cuInit was not called");
    return device == 0 ? kSuccess : fail(kInvalidDevice, "there is no device %d", device);
}

// From the table "technical specifications per compute capability" of the programming guide.
int shared_memory_opt_in_limit() {
    switch (process_options.compute_capability) {
        case 75: return 64 << 10;
        case 80:
        case 87: return 163 << 10;
        case 90:
        case 100:
        case 103:
        case 110: return 227 << 10;
        default: return 99 << 10;
    }
}

// Attributes that do not depend on an option, by CUdevice_attribute.
static const std::map<int, int> kFixedAttributes = {
    {1, 1024},        // MAX_THREADS_PER_BLOCK
    {2, 1024},        // MAX_BLOCK_DIM_X
    {3, 1024},        // MAX_BLOCK_DIM_Y
    {4, 64},          // MAX_BLOCK_DIM_Z
    {5, 0x7fffffff},  // MAX_GRID_DIM_X
    {6, 65535},       // MAX_GRID_DIM_Y
    {7, 65535},       // MAX_GRID_DIM_Z
    {8, 48 << 10},    // MAX_SHARED_MEMORY_PER_BLOCK
    {9, 64 << 10},    // TOTAL_CONSTANT_MEMORY
    {10, 32},         // WARP_SIZE
    {12, 65536},      // MAX_REGISTERS_PER_BLOCK
    {13, 1980000},    // CLOCK_RATE, kHz
    {18, 0},          // INTEGRATED
    {19, 1},          // CAN_MAP_HOST_MEMORY
    {31, 1},          // CONCURRENT_KERNELS
    {36, 2619000},    // MEMORY_CLOCK_RATE, kHz
    {37, 5120},       // GLOBAL_MEMORY_BUS_WIDTH, bits
    {38, 50 << 20},   // L2_CACHE_SIZE
    {39, 2048},       // MAX_THREADS_PER_MULTIPROCESSOR
    {41, 1},          // UNIFIED_ADDRESSING
    {82, 65536},      // MAX_REGISTERS_PER_MULTIPROCESSOR
    {95, 0},          // COOPERATIVE_LAUNCH: blocks run one after another
    {106, 32},        // MAX_BLOCKS_PER_MULTIPROCESSOR
    {111, 1024},      // RESERVED_SHARED_MEMORY_PER_BLOCK
    {115, 1},         // MEMORY_POOLS_SUPPORTED
};

}  // namespace softgpu

using namespace softgpu;

DRIVER_API Result cuInit(unsigned) {
    if (Result error = start_alone()) return error;
    initialized = true;
    return kSuccess;
}

DRIVER_API Result cuDriverGetVersion(int* version) {
    *version = process_options.cuda_version;
    return kSuccess;
}

DRIVER_API Result cuDeviceGetCount(int* count) {
    if (!initialized) return fail(kNotInitialized, "cuInit was not called");
    *count = 1;
    return kSuccess;
}

DRIVER_API Result cuDeviceGet(int* device, int ordinal) {
    if (Result error = check_device(ordinal)) return error;
    *device = 0;
    return kSuccess;
}

DRIVER_API Result cuDeviceGetName(char* name, int length, int device) {
    if (Result error = check_device(device)) return error;
    const int capability = int(process_options.compute_capability);
    snprintf(name, size_t(length), "software device %d.%d", capability / 10, capability % 10);
    return kSuccess;
}

DRIVER_API Result cuDeviceGetUuid_v2(void* uuid, int device) {
    if (Result error = check_device(device)) return error;
    memset(uuid, 0x5f, 16);
    return kSuccess;
}

DRIVER_API Result cuDeviceTotalMem_v2(size_t* bytes, int device) {
    if (Result error = check_device(device)) return error;
    *bytes = size_t(process_options.total_memory);
    return kSuccess;
}

DRIVER_API Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (Result error = check_device(device)) return error;
    const int capability = int(process_options.compute_capability);
    switch (attribute) {
        case 16: *value = int(process_options.multiprocessors); return kSuccess;
        case 75: *value = capability / 10; return kSuccess;
        case 76: *value = capability % 10; return kSuccess;
        case 81: *value = shared_memory_opt_in_limit() + 1024; return kSuccess;  // per multiprocessor
        case 97: *value = shared_memory_opt_in_limit(); return kSuccess;
    }
    auto found = kFixedAttributes.find(attribute);
    if (found == kFixedAttributes.end()) return fail(kInvalidValue, "device attribute %d is not implemented", attribute);
    *value = found->second;
    return kSuccess;
}

DRIVER_API Result cuDevicePrimaryCtxRetain(void** context, int device) {
    if (Result error = check_device(device)) return error;
    *context = &primary_context;
    return kSuccess;
}

DRIVER_API Result cuDevicePrimaryCtxRelease_v2(int) { return kSuccess; }

DRIVER_API Result cuCtxGetCurrent(void** context) {
    *context = current_context();
    return kSuccess;
}

DRIVER_API Result cuCtxSetCurrent(void* context) {
    if (!context_stack.empty()) context_stack.pop_back();
    if (context != nullptr) context_stack.push_back(context);
    return kSuccess;
}

DRIVER_API Result cuCtxPushCurrent_v2(void* context) {
    if (context != &primary_context) return fail(kInvalidContext, "push of a context that does not exist");
    context_stack.push_back(context);
    return kSuccess;
}

DRIVER_API Result cuCtxPopCurrent_v2(void** context) {
    if (context_stack.empty()) return fail(kInvalidContext, "pop without a current context");
    if (context != nullptr) *context = context_stack.back();
    context_stack.pop_back();
    return kSuccess;
}

DRIVER_API Result cuCtxGetDevice(int* device) {
    if (Result error = require_context()) return error;
    *device = 0;
    return kSuccess;
}

DRIVER_API Result cuCtxGetApiVersion(void*, unsigned* version) {
    *version = 3020;
    return kSuccess;
}

DRIVER_API Result cuCtxSetFlags(unsigned) { return kSuccess; }

DRIVER_API Result cuStreamGetCtx(void*, void** context) {
    *context = &primary_context;
    return kSuccess;
}

static const char* result_name(int result) {
    switch (result) {
        case kSuccess: return "CUDA_SUCCESS";
        case kInvalidValue: return "CUDA_ERROR_INVALID_VALUE";
        case kOutOfMemory: return "CUDA_ERROR_OUT_OF_MEMORY";
        case kNotInitialized: return "CUDA_ERROR_NOT_INITIALIZED";
        case kInvalidDevice: return "CUDA_ERROR_INVALID_DEVICE";
        case kInvalidContext: return "CUDA_ERROR_INVALID_CONTEXT";
        case kNoBinaryForGpu: return "CUDA_ERROR_NO_BINARY_FOR_GPU";
        case kInvalidPtx: return "CUDA_ERROR_INVALID_PTX";
        case kUnsupportedPtxVersion: return "CUDA_ERROR_UNSUPPORTED_PTX_VERSION";
        case kInvalidHandle: return "CUDA_ERROR_INVALID_HANDLE";
        case kIllegalState: return "CUDA_ERROR_ILLEGAL_STATE";
        case kNotFound: return "CUDA_ERROR_NOT_FOUND";
        case kNotReady: return "CUDA_ERROR_NOT_READY";
        case kIllegalAddress: return "CUDA_ERROR_ILLEGAL_ADDRESS";
        case kMisalignedAddress: return "CUDA_ERROR_MISALIGNED_ADDRESS";
        case kLaunchFailed: return "CUDA_ERROR_LAUNCH_FAILED";
        case kNotSupported: return "CUDA_ERROR_NOT_SUPPORTED";
        case kCaptureUnsupported: return "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED";
        case kCaptureInvalidated: return "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED";
        case kCaptureUnmatched: return "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED";
        case kCaptureUnjoined: return "CUDA_ERROR_STREAM_CAPTURE_UNJOINED";
        case kCaptureIsolation: return "CUDA_ERROR_STREAM_CAPTURE_ISOLATION";
        case kCapturedEvent: return "CUDA_ERROR_CAPTURED_EVENT";
        case kCaptureWrongThread: return "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD";
    }
    return nullptr;
}

DRIVER_API Result cuGetErrorName(int result, const char** name) {
    *name = result_name(result);
    return *name == nullptr ? kInvalidValue : kSuccess;
}

DRIVER_API Result cuGetErrorString(int result, const char** text) { return cuGetErrorName(result, text); }
