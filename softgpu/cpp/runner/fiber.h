// Stacks of fibers, and switching between them.
#pragma once

namespace softgpu {

constexpr unsigned long kStackBytes = 64 << 10;
constexpr unsigned long kGuardBytes = 4096;

// A stack with a guard page below it.
void* allocate_stack();
void free_stack(void* stack);

// Returns the stack pointer of a fiber that will start at `entry`. `color` staggers the tops of stacks. At distances that are
// multiples of the page size, they would all compete for the same few cache lines.
void* prepare_stack(void* stack, unsigned color, void (*entry)());

// Saves the caller's registers and stack pointer in *from and resumes the fiber whose stack pointer is `to`.
extern "C" void softgpu_switch(void** from, void* to);

}  // namespace softgpu
