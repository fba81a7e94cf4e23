// Start of the emulator, and the report file that outlives the process.
#include "start.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

#include "faults.h"
#include "modules.h"

namespace softgpu {

static int report_file = -1;

// The file is created at the start, empty. So a missing file means that the emulator did not start.
static void open_report() {
    const char* path = getenv("SOFTGPU_REPORT");
    if (path == nullptr || *path == '\0') return;
    report_file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (report_file < 0) {
        fprintf(stderr, "softgpu: SOFTGPU_REPORT=%s cannot be written to\n", path);
        abort();
    }
}

void write_report(const char* line) {
    if (report_file < 0) return;
    // In one write, so that lines of several threads do not mix.
    const std::string whole = std::string(line) + '\n';
    if (write(report_file, whole.data(), whole.size()) != ssize_t(whole.size())) {
        fprintf(stderr, "softgpu: SOFTGPU_REPORT cannot be written to\n");
        abort();
    }
}

static void start() {
    static std::once_flag once;
    std::call_once(once, [] {
        read_environment();
        open_report();
        install_fault_handlers();
    });
}

// Path of the kernel library: from the environment, or next to this library.
static std::string kernels_path() {
    if (const char* path = getenv("SOFTGPU_KERNELS")) return path;
    Dl_info here;
    if (dladdr(reinterpret_cast<void*>(&start_alone), &here) == 0) return "libkernels.so";
    const std::string path = here.dli_fname;
    const size_t slash = path.rfind('/');
    return (slash == std::string::npos ? "" : path.substr(0, slash + 1)) + "libkernels.so";
}

Result start_alone() {
    start();
    static std::once_flag once;
    static std::string why;
    std::call_once(once, [] {
        if (has_host_kernels()) return;  // softgpu::install has loaded them
        if (dlopen(kernels_path().c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) why = dlerror();
    });
    return why.empty() ? kSuccess : fail(kNotFound, "no kernels: %s", why.c_str());
}

}  // namespace softgpu

// For softgpu::install.
DRIVER_API void softgpu_start() { softgpu::start(); }
