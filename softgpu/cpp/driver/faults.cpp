// Signal handlers, and the functions that the compiler's undefined-behaviour checks in kernels call.
#include "faults.h"

#include <csignal>
#include <cstdint>

#include "../runner/runner.h"
#include "driver.h"

namespace softgpu {

static struct sigaction previous_segv, previous_bus, previous_fpe;

static void pass_on(const struct sigaction& previous, int signal_number, siginfo_t* info, void* context) {
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal_number, info, context);
    } else {
        signal(signal_number, SIG_DFL);
        raise(signal_number);
    }
}

static void on_fault(int signal_number, siginfo_t* info, void* context) {
    if (in_kernel()) stop_kernel_at(info->si_addr, signal_number);
    switch (signal_number) {
        case SIGBUS: return pass_on(previous_bus, signal_number, info, context);
        case SIGFPE: return pass_on(previous_fpe, signal_number, info, context);
        default: return pass_on(previous_segv, signal_number, info, context);
    }
}

void install_fault_handlers() {
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    // The handler does not return but jumps back to the launch, so the signal must not stay blocked.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
    sigaction(SIGFPE, &action, &previous_fpe);
}

// Every record of the compiler's checks begins with the source location.
struct SourceLocation {
    const char* file;
    uint32_t line, column;
};

static void undefined_operation(Problem problem, const void* record, const char* what) {
    const auto* place = static_cast<const SourceLocation*>(record);
    stop_kernel(problem, "%s at %s:%u", what, place->file, place->line);
}

}  // namespace softgpu

using softgpu::Problem;
using softgpu::undefined_operation;

DRIVER_API void __ubsan_handle_type_mismatch_v1(const void* record, uintptr_t) {
    undefined_operation(Problem::Misaligned, record, "misaligned or null access");
}
DRIVER_API void __ubsan_handle_out_of_bounds(const void* record, uintptr_t) {
    undefined_operation(Problem::Other, record, "index out of an array");
}
DRIVER_API void __ubsan_handle_shift_out_of_bounds(const void* record, uintptr_t, uintptr_t) {
    undefined_operation(Problem::Other, record, "shift by too much");
}
DRIVER_API void __ubsan_handle_divrem_overflow(const void* record, uintptr_t, uintptr_t) {
    undefined_operation(Problem::Other, record, "integer division by zero or overflow");
}
