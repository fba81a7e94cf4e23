// Driver calls: allocation, copies and fills.
#include <algorithm>
#include <cstring>

#include "memory.h"
#include "streams.h"

namespace softgpu {

namespace {

// Ranges are checked at the call and again when the work runs. In a graph or in lazy mode that is later, and the memory may
// have been freed.
Result copy_to_device(DevicePtr destination, const void* source, size_t bytes) {
    if (Result error = check_range(destination, bytes, "copy to the device")) return error;
    memcpy(reinterpret_cast<void*>(destination), source, bytes);
    return kSuccess;
}

Result copy_to_host(void* destination, DevicePtr source, size_t bytes) {
    if (Result error = check_range(source, bytes, "copy to the host")) return error;
    memcpy(destination, reinterpret_cast<const void*>(source), bytes);
    return kSuccess;
}

Result check_device_copy(DevicePtr destination, DevicePtr source, size_t bytes) {
    if (Result error = check_range(source, bytes, "device copy, source")) return error;
    if (Result error = check_range(destination, bytes, "device copy, destination")) return error;
    if (bytes > 0 && source < destination + bytes && destination < source + bytes) {
        return fail(kInvalidValue, "device copy of %zu bytes between overlapping ranges", bytes);
    }
    return kSuccess;
}

Result copy_on_device(DevicePtr destination, DevicePtr source, size_t bytes) {
    if (Result error = check_device_copy(destination, source, bytes)) return error;
    memcpy(reinterpret_cast<void*>(destination), reinterpret_cast<const void*>(source), bytes);
    return kSuccess;
}

template <class T> Result fill(DevicePtr destination, T value, size_t count, void* stream) {
    if (destination % sizeof(T) != 0) return fail(kInvalidValue, "memset of %zu-byte values: misaligned", sizeof(T));
    if (Result error = check_range(destination, count * sizeof(T), "memset")) return error;
    return submit(stream, NodeType::Set, [=] {
        if (Result error = check_range(destination, count * sizeof(T), "memset")) return error;
        std::fill_n(reinterpret_cast<T*>(destination), count, value);
        return kSuccess;
    });
}

bool is_captured(void* stream_handle) {
    auto stream = find_stream(stream_handle);
    return stream != nullptr && stream->capture != nullptr;
}

// Copies without a stream wait for all earlier work and for themselves.
Result catch_up_for_blocking_copy(const char* what) {
    if (Result error = refuse_in_capture(what)) return error;
    count_blocking_call();
    return catch_up_all();
}

}  // namespace

}  // namespace softgpu

using namespace softgpu;

DRIVER_API Result cuMemAlloc_v2(DevicePtr* address, size_t bytes) {
    if (Result error = require_context()) return error;
    if (Result error = refuse_in_capture("cuMemAlloc")) return error;
    if (bytes == 0) return fail(kInvalidValue, "cuMemAlloc of 0 bytes");
    return allocate(address, bytes, MemoryKind::Device);
}

DRIVER_API Result cuMemAllocAsync(DevicePtr* address, size_t bytes, void* stream) {
    if (Result error = require_context()) return error;
    // Stricter than a real driver, which would add an allocation node to the graph.
    if (is_captured(stream)) return fail(kCaptureUnsupported, "allocation during a capture");
    return allocate(address, bytes, MemoryKind::Device);
}

DRIVER_API Result cuMemFree_v2(DevicePtr address) {
    if (Result error = refuse_in_capture("cuMemFree")) return error;
    count_blocking_call();
    catch_up_all();
    return release(address, MemoryKind::Device);
}

DRIVER_API Result cuMemFreeAsync(DevicePtr address, void* stream) {
    return submit(stream, NodeType::Free, [=] { return release(address, MemoryKind::Device); });
}

DRIVER_API Result cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    if (Result error = require_context()) return error;
    if (Result error = refuse_in_capture("cuMemHostAlloc")) return error;
    DevicePtr allocated = 0;
    const Result result = allocate(&allocated, bytes, MemoryKind::PinnedHost);
    *address = reinterpret_cast<void*>(allocated);
    return result;
}

DRIVER_API Result cuMemAllocHost_v2(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }

DRIVER_API Result cuMemFreeHost(void* address) {
    if (Result error = refuse_in_capture("cuMemFreeHost")) return error;
    catch_up_all();
    return release(DevicePtr(address), MemoryKind::PinnedHost);
}

// Pinned memory has one address for host and device.
DRIVER_API Result cuMemHostGetDevicePointer_v2(DevicePtr* device_address, void* host_address, unsigned) {
    if (!is_pinned_host(host_address)) return fail(kInvalidValue, "%p is not pinned host memory", host_address);
    *device_address = DevicePtr(host_address);
    return kSuccess;
}

DRIVER_API Result cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
    *total_bytes = size_t(process_options.total_memory);
    *free_bytes = *total_bytes - size_t(process_options.used_memory);
    return kSuccess;
}

DRIVER_API Result cuMemcpyHtoDAsync_v2(DevicePtr destination, const void* source, size_t bytes, void* stream) {
    if (Result error = check_range(destination, bytes, "copy to the device")) return error;
    if (Result error = check_host_pointer(source, "copy to the device")) return error;
    if (is_lazy() && !is_captured(stream) && !is_pinned_host(source)) {
        // Pageable memory is read at the call; only pinned memory is read when the copy runs.
        const char* first = static_cast<const char*>(source);
        auto staged = std::make_shared<std::vector<char>>(first, first + bytes);
        return submit(stream, NodeType::Copy, [=] { return copy_to_device(destination, staged->data(), bytes); });
    }
    return submit(stream, NodeType::Copy, [=] { return copy_to_device(destination, source, bytes); });
}

DRIVER_API Result cuMemcpyDtoHAsync_v2(void* destination, DevicePtr source, size_t bytes, void* stream) {
    if (Result error = check_range(source, bytes, "copy to the host")) return error;
    if (Result error = check_host_pointer(destination, "copy to the host")) return error;
    const Result result =
        submit(stream, NodeType::Copy, [=] { return copy_to_host(destination, source, bytes); });
    if (result != kSuccess || is_captured(stream) || is_pinned_host(destination)) return result;
    count_blocking_call();  // for pageable memory the driver waits for the copy
    return catch_up(*find_stream(stream));
}

DRIVER_API Result cuMemcpyDtoDAsync_v2(DevicePtr destination, DevicePtr source, size_t bytes, void* stream) {
    if (Result error = check_device_copy(destination, source, bytes)) return error;
    return submit(stream, NodeType::Copy, [=] { return copy_on_device(destination, source, bytes); });
}

DRIVER_API Result cuMemcpyHtoD_v2(DevicePtr destination, const void* source, size_t bytes) {
    if (Result error = catch_up_for_blocking_copy("a blocking copy")) return error;
    if (Result error = check_host_pointer(source, "copy to the device")) return error;
    return copy_to_device(destination, source, bytes);
}

DRIVER_API Result cuMemcpyDtoH_v2(void* destination, DevicePtr source, size_t bytes) {
    if (Result error = catch_up_for_blocking_copy("a blocking copy")) return error;
    if (Result error = check_host_pointer(destination, "copy to the host")) return error;
    return copy_to_host(destination, source, bytes);
}

DRIVER_API Result cuMemcpyDtoD_v2(DevicePtr destination, DevicePtr source, size_t bytes) {
    if (Result error = catch_up_for_blocking_copy("a blocking copy")) return error;
    return copy_on_device(destination, source, bytes);
}

DRIVER_API Result cuMemsetD8Async(DevicePtr destination, unsigned char value, size_t count, void* stream) {
    return fill(destination, value, count, stream);
}

DRIVER_API Result cuMemsetD16Async(DevicePtr destination, unsigned short value, size_t count, void* stream) {
    return fill(destination, value, count, stream);
}

DRIVER_API Result cuMemsetD32Async(DevicePtr destination, unsigned value, size_t count, void* stream) {
    return fill(destination, value, count, stream);
}

DRIVER_API Result cuMemsetD8_v2(DevicePtr destination, unsigned char value, size_t count) {
    return fill(destination, value, count, nullptr);
}

DRIVER_API Result cuMemsetD16_v2(DevicePtr destination, unsigned short value, size_t count) {
    return fill(destination, value, count, nullptr);
}

DRIVER_API Result cuMemsetD32_v2(DevicePtr destination, unsigned value, size_t count) {
    return fill(destination, value, count, nullptr);
}
