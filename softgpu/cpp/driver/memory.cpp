// One reserved range of addresses, each used at most once. Every allocation has its own pages and ends at a guard page;
// freeing it unmaps the pages. So most wrong accesses fault, and an address always identifies its allocation.
#include "memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

namespace softgpu {

namespace {

constexpr size_t kPage = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN in bf16, f16 and f32, -1 in integers

struct Allocation {
    size_t bytes;
    char* first_page;
    size_t page_bytes;
    int id;
    MemoryKind kind;
    bool live;
    bool poisoned;
};

struct Arena {
    std::mutex lock;
    char* begin = nullptr;
    char* end = nullptr;
    char* next = nullptr;
    int allocations_made = 0;
    std::map<DevicePtr, Allocation> allocations;

    bool contains(const void* address) const { return address >= begin && address < end; }
    bool reserve_addresses();
    char* take_pages(size_t page_bytes);
    Allocation* allocation_before(DevicePtr address, DevicePtr* start);
    Allocation* allocation_at(DevicePtr address, DevicePtr* start);
};

Arena arena;

// Unused address space is free. If a limit forbids 4 TiB, a smaller range suffices.
bool Arena::reserve_addresses() {
    for (size_t bytes = size_t(4) << 40; bytes >= size_t(1) << 33; bytes >>= 1) {
        void* range = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (range == MAP_FAILED) continue;
        begin = next = static_cast<char*>(range);
        end = begin + bytes;
        return true;
    }
    return false;
}

// Returns readable and writable pages, followed by a guard page.
char* Arena::take_pages(size_t page_bytes) {
    if (begin == nullptr && !reserve_addresses()) return nullptr;
    if (size_t(end - next) < page_bytes + kPage) return nullptr;
    char* pages = next;
    if (mprotect(pages, page_bytes, PROT_READ | PROT_WRITE) != 0) return nullptr;
    next += page_bytes + kPage;
    return pages;
}

// Returns the last allocation, live or freed, that starts at or before the address.
Allocation* Arena::allocation_before(DevicePtr address, DevicePtr* start) {
    auto found = allocations.upper_bound(address);
    if (found == allocations.begin()) return nullptr;
    --found;
    *start = found->first;
    return &found->second;
}

// Returns the allocation of an address. The end of an allocation counts as a part of it, for empty ranges.
Allocation* Arena::allocation_at(DevicePtr address, DevicePtr* start) {
    Allocation* found = allocation_before(address, start);
    return found != nullptr && address <= *start + found->bytes ? found : nullptr;
}

bool must_fail_on_request() {
    int64_t& to_go = thread_options().fail_alloc;
    if (to_go < 0) return false;
    return to_go-- == 0;
}

// Checks, when an allocation is freed, the bytes of its pages that are outside the allocation.
Result check_slack(const Allocation& allocation, const char* data) {
    const char* const pages_end = allocation.first_page + allocation.page_bytes;
    for (const char* byte = allocation.first_page; byte < pages_end; byte++) {
        if (byte == data) {
            byte += allocation.bytes - 1;
            continue;
        }
        if (static_cast<unsigned char>(*byte) != kPoison) {
            return fail(kIllegalAddress, "allocation %d (%zu bytes): the byte at offset %td was overwritten",
                        allocation.id, allocation.bytes, byte - data);
        }
    }
    return kSuccess;
}

}  // namespace

Result allocate(DevicePtr* out, size_t bytes, MemoryKind kind) {
    *out = 0;
    if (bytes == 0) return kSuccess;
    if (must_fail_on_request()) return fail(kOutOfMemory, "allocation of %zu bytes refused on request", bytes);

    const ThreadOptions& options = thread_options();
    const size_t align = kind == MemoryKind::PinnedHost ? 64 : size_t(options.align);
    const size_t page_bytes = (bytes + align - 1 + kPage - 1) / kPage * kPage;

    std::lock_guard<std::mutex> guard(arena.lock);
    const bool device = kind == MemoryKind::Device;
    if (device && process_options.used_memory + int64_t(bytes) > process_options.total_memory) {
        return fail(kOutOfMemory, "allocation of %zu bytes with %ld of %ld in use", bytes,
                    long(process_options.used_memory), long(process_options.total_memory));
    }
    char* pages = arena.take_pages(page_bytes);
    if (pages == nullptr) return fail(kOutOfMemory, "no addresses left for an allocation of %zu bytes", bytes);

    // As close to the guard page as the alignment allows.
    char* data = pages;
    if (options.guard) data = reinterpret_cast<char*>(uintptr_t(pages + page_bytes - bytes) & ~uintptr_t(align - 1));
    if (options.poison) memset(pages, kPoison, page_bytes);

    const int id = ++arena.allocations_made;
    *out = DevicePtr(data);
    arena.allocations[*out] = {bytes, pages, page_bytes, id, kind, true, options.poison != 0};
    if (device) {
        process_options.used_memory += int64_t(bytes);
        process_options.live_allocations++;
    }
    return kSuccess;
}

Result release(DevicePtr address, MemoryKind kind) {
    if (address == 0) return kSuccess;
    std::lock_guard<std::mutex> guard(arena.lock);
    auto found = arena.allocations.find(address);
    if (found == arena.allocations.end() || found->second.kind != kind) {
        return fail(kInvalidValue, "free of %#lx, which was never allocated that way", address);
    }
    Allocation& allocation = found->second;
    if (!allocation.live) return fail(kInvalidValue, "double free of allocation %d", allocation.id);

    const char* data = reinterpret_cast<const char*>(address);
    const Result result = allocation.poisoned ? check_slack(allocation, data) : kSuccess;
    allocation.live = false;
    if (kind == MemoryKind::Device) {
        process_options.used_memory -= int64_t(allocation.bytes);
        process_options.live_allocations--;
    }
    madvise(allocation.first_page, allocation.page_bytes, MADV_DONTNEED);
    mprotect(allocation.first_page, allocation.page_bytes, PROT_NONE);
    return result;
}

Result check_range(DevicePtr address, size_t bytes, const char* what) {
    if (bytes == 0) return kSuccess;
    std::lock_guard<std::mutex> guard(arena.lock);
    DevicePtr start;
    const Allocation* allocation = arena.allocation_at(address, &start);
    if (allocation == nullptr) return fail(kInvalidValue, "%s: %#lx is not device memory", what, address);
    if (!allocation->live) return fail(kInvalidValue, "%s: allocation %d was freed", what, allocation->id);
    const size_t offset = address - start;
    if (bytes > allocation->bytes - offset) {
        return fail(kInvalidValue, "%s: %zu bytes from offset %zu of allocation %d, which has %zu", what, bytes, offset,
                    allocation->id, allocation->bytes);
    }
    return kSuccess;
}

Result check_host_pointer(const void* address, const char* what) {
    if (!arena.contains(address) || is_pinned_host(address)) return kSuccess;
    return fail(kInvalidValue, "%s: the host side %p is %s", what, address, describe_address(address).c_str());
}

bool is_pinned_host(const void* address) {
    std::lock_guard<std::mutex> guard(arena.lock);
    DevicePtr start;
    const Allocation* allocation = arena.allocation_at(DevicePtr(address), &start);
    return allocation != nullptr && allocation->live && allocation->kind == MemoryKind::PinnedHost;
}

bool is_dangling(DevicePtr word, std::string* what) {
    std::lock_guard<std::mutex> guard(arena.lock);
    const char* address = reinterpret_cast<const char*>(word);
    // Addresses that were never allocated are ignored: they are more likely stale bytes in padding.
    if (address < arena.begin || address >= arena.next) return false;
    DevicePtr start;
    const Allocation* allocation = arena.allocation_at(word, &start);
    if (allocation != nullptr && allocation->live) return false;
    *what = allocation == nullptr ? "no allocation" : "freed memory";
    return true;
}

std::string describe_address(const void* address) {
    std::lock_guard<std::mutex> guard(arena.lock);
    DevicePtr start;
    if (!arena.contains(address)) return "no device memory";
    const Allocation* allocation = arena.allocation_before(DevicePtr(address), &start);
    if (allocation == nullptr) return "no device memory";
    char text[160];
    snprintf(text, sizeof text, "%ld bytes past the start of %sallocation %d of %zu bytes",
             long(DevicePtr(address) - start), allocation->live ? "" : "freed ", allocation->id, allocation->bytes);
    return text;
}

}  // namespace softgpu

DRIVER_API int softgpu_check_range(uint64_t address, size_t bytes, const char* what) {
    return softgpu::check_range(address, bytes, what);
}
