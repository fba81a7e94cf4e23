#include "shared_memory.h"

#include <link.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../include/softgpu/runtime.h"

namespace softgpu {

constexpr size_t kPage = 4096;
constexpr size_t kDynamicAlignment = 128;
constexpr int kPoison = 0xff;

static void* (*shared_anchor)() = nullptr;

extern "C" __attribute__((visibility("default"))) void softgpu_register_shared(void* (*anchor)()) {
    shared_anchor = anchor;
}

// Thread-local block of the library that holds `anchor`: this host thread's instance of all its __shared__ arrays.
struct ThreadLocalBlock {
    const void* anchor;
    unsigned char* begin;
    size_t bytes;
};

static int find_thread_local_block(dl_phdr_info* library, size_t, void* user) {
    auto* wanted = static_cast<ThreadLocalBlock*>(user);
    if (library->dlpi_tls_data == nullptr) return 0;
    for (int i = 0; i < library->dlpi_phnum; i++) {
        const auto& header = library->dlpi_phdr[i];
        auto* begin = static_cast<unsigned char*>(library->dlpi_tls_data);
        if (header.p_type != PT_TLS || wanted->anchor < begin || wanted->anchor >= begin + header.p_memsz) continue;
        wanted->begin = begin;
        wanted->bytes = header.p_memsz;
        return 1;
    }
    return 0;
}

SharedMemory::~SharedMemory() {
    if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_ + kPage);
}

void SharedMemory::prepare(size_t dynamic_bytes) {
    if (static_ == nullptr && shared_anchor != nullptr) {
        ThreadLocalBlock found{shared_anchor(), nullptr, 0};
        dl_iterate_phdr(find_thread_local_block, &found);
        static_ = found.begin;
        static_bytes_ = found.bytes;
    }
    const size_t rounded = (dynamic_bytes + kDynamicAlignment - 1) / kDynamicAlignment * kDynamicAlignment;
    if (mapping_ == nullptr || rounded > mapping_bytes_) {
        if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_ + kPage);
        mapping_bytes_ = (rounded + kPage) / kPage * kPage;
        const int access = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
        void* mapping = mmap(nullptr, mapping_bytes_ + kPage, access, flags, -1, 0);
        if (mapping == MAP_FAILED) {
            fprintf(stderr, "softgpu: no memory for the shared memory of a block\n");
            abort();
        }
        mapping_ = static_cast<unsigned char*>(mapping);
        mprotect(mapping_ + mapping_bytes_, kPage, PROT_NONE);
    }
    dynamic_ = mapping_ + mapping_bytes_ - rounded;
    dynamic_bytes_ = rounded;
}

void SharedMemory::poison(bool include_static) {
    memset(dynamic_, kPoison, dynamic_bytes_);
    if (include_static && static_ != nullptr) memset(static_, kPoison, static_bytes_);
}

static bool lies_in(const void* address, size_t bytes, const unsigned char* begin, size_t length) {
    const auto* first = static_cast<const unsigned char*>(address);
    return first >= begin && first + bytes <= begin + length;
}

bool SharedMemory::contains(const void* address, size_t bytes) const {
    return lies_in(address, bytes, dynamic_, dynamic_bytes_) || lies_in(address, bytes, static_, static_bytes_);
}

bool SharedMemory::is_behind_dynamic(const void* address) const {
    return mapping_ != nullptr && lies_in(address, 1, mapping_ + mapping_bytes_, kPage);
}

}  // namespace softgpu
