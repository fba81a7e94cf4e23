// Device memory and pinned host memory.
#pragma once
#include <string>

#include "driver.h"

namespace softgpu {

enum class MemoryKind { Device, PinnedHost };

Result allocate(DevicePtr* out, size_t bytes, MemoryKind kind);
Result release(DevicePtr address, MemoryKind kind);

// Whether [address, address + bytes) lies inside one live allocation; `what` names the range in the report.
Result check_range(DevicePtr address, size_t bytes, const char* what);
// The host side of a copy may be any host memory, but not device memory.
Result check_host_pointer(const void* address, const char* what);

bool is_pinned_host(const void* address);
// Whether a word of a kernel's arguments looks like a device address but points into no live allocation.
bool is_dangling(DevicePtr word, std::string* what);
// For reports: names the allocation that an address belongs to, or that precedes it.
std::string describe_address(const void* address);

}  // namespace softgpu
