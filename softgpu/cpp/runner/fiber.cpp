#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

namespace softgpu {

// Returns by popping the address and jumping: a `ret` would be mispredicted every time, because the call that the
// return predictor remembers is never the right one. This halves the time of a switch.
asm(R"(
.text
.globl softgpu_switch
.type softgpu_switch, @function
softgpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
.size softgpu_switch, . - softgpu_switch
)");

constexpr int kSavedRegisters = 6;

void* allocate_stack() {
    void* stack = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, kGuardBytes, PROT_NONE) != 0) {
        fprintf(stderr, "softgpu: no memory for the stack of a thread\n");
        abort();
    }
    return stack;
}

void free_stack(void* stack) { munmap(stack, kGuardBytes + kStackBytes); }

void* prepare_stack(void* stack, unsigned color, void (*entry)()) {
    char* const end = static_cast<char*>(stack) + kGuardBytes + kStackBytes;
    void** top = reinterpret_cast<void**>(end - color * 256);
    *--top = nullptr;  // where a return address would be: `entry` sees the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < kSavedRegisters; i++) *--top = nullptr;
    return top;
}

}  // namespace softgpu
