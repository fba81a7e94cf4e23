// Stacks, and switching between them.
#pragma once

namespace softgpu {

constexpr unsigned long kStackBytes = 64 << 10;
constexpr unsigned long kGuardBytes = 4096;

// A stack with a page below it that faults.
void* allocate_stack();
void free_stack(void* stack);

// The stack pointer of a fiber that will start at `entry`. `color` staggers the tops of stacks: at equal distances of a
// multiple of the page size they would all compete for the same few cache lines.
void* prepare_stack(void* stack, unsigned color, void (*entry)());

// Saves the caller's registers and stack pointer in *from and goes on where `to` was saved.
extern "C" void softgpu_switch(void** from, void* to);

}  // namespace softgpu
