// Shared memory of a block, static and dynamic, of the calling host thread.
#pragma once
#include <cstddef>

namespace softgpu {

class SharedMemory {
  public:
    ~SharedMemory();
    // Allocates the memory for a launch. The dynamic part ends, up to its alignment, at a guard page.
    void prepare(size_t dynamic_bytes);
    void poison(bool include_static);

    unsigned char* dynamic() const { return dynamic_; }
    bool contains(const void* address, size_t bytes) const;
    bool is_behind_dynamic(const void* address) const;

  private:
    unsigned char* mapping_ = nullptr;
    size_t mapping_bytes_ = 0;  // without the guard page
    unsigned char* dynamic_ = nullptr;
    size_t dynamic_bytes_ = 0;
    unsigned char* static_ = nullptr;
    size_t static_bytes_ = 0;
};

}  // namespace softgpu
