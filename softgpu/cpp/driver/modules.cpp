// Modules: the PTX text lists kernels and parameters; the table of host kernels has their code.
#include "modules.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "streams.h"

namespace softgpu {

namespace {

struct Module {
    bool is_binary = false;  // a cubin or fatbin, whose kernels cannot be listed
    std::map<std::string, std::unique_ptr<Function>> functions;
};

HandleTable<Module>& modules() {
    static auto* table = new HandleTable<Module>;
    return *table;
}

// Filled by static constructors of the kernels' library.
std::map<std::string, const Kernel*>& host_kernels() {
    static auto* table = new std::map<std::string, const Kernel*>;
    return *table;
}

const Kernel* find_host_kernel(const std::string& name) {
    auto found = host_kernels().find(name);
    return found == host_kernels().end() ? nullptr : found->second;
}

bool is_binary_image(const char* image) {
    return memcmp(image, "\x7f" "ELF", 4) == 0 || memcmp(image, "\x50\xed\x55\xba", 4) == 0;
}

Result check_version_and_target(const PtxModule& ptx) {
    if (ptx.version > process_options.max_ptx) {
        return fail(kUnsupportedPtxVersion, "PTX version %d.%d is newer than this driver, which knows %d.%d",
                    ptx.version / 10, ptx.version % 10, int(process_options.max_ptx) / 10,
                    int(process_options.max_ptx) % 10);
    }
    const int capability = int(process_options.compute_capability);
    if (ptx.target > capability || (ptx.architecture_specific && ptx.target != capability)) {
        return fail(kNoBinaryForGpu, "a module for sm_%d%s does not run on a device of compute capability %d.%d",
                    ptx.target, ptx.architecture_specific ? "a" : "", capability / 10, capability % 10);
    }
    return kSuccess;
}

Result load_module(void** out, const char* image) {
    if (Result error = require_context()) return error;
    if (Result error = refuse_in_capture("module load")) return error;
    auto module = std::make_shared<Module>();
    module->is_binary = is_binary_image(image);
    if (!module->is_binary) {
        PtxModule ptx;
        if (!read_ptx(image, &ptx)) return fail(kInvalidPtx, "the image is neither PTX nor a binary for a GPU");
        if (Result error = check_version_and_target(ptx)) return error;
        for (PtxKernel& kernel : ptx.kernels) {
            auto function = std::make_unique<Function>();
            function->host_kernel = find_host_kernel(kernel.name);
            function->ptx = std::move(kernel);
            function->max_dynamic_shared = kDefaultSharedLimit - int(function->ptx.static_shared_bytes);
            if (function->max_dynamic_shared < 0) {
                return fail(kInvalidPtx, "%s: %u bytes of static shared memory, of which there may be %d",
                            function->ptx.name.c_str(), function->ptx.static_shared_bytes, kDefaultSharedLimit);
            }
            module->functions[function->ptx.name] = std::move(function);
        }
    }
    *out = modules().add(module);
    return kSuccess;
}

// Detects a stale PTX file, and a struct whose layout differs between two compilers.
Result check_parameters(const Function& function) {
    const Kernel& kernel = *function.host_kernel;
    const std::vector<unsigned>& in_ptx = function.ptx.parameter_bytes;
    const std::vector<unsigned> on_host(kernel.parameter_sizes, kernel.parameter_sizes + kernel.parameter_count);
    if (in_ptx == on_host) return kSuccess;
    auto list = [](const std::vector<unsigned>& sizes) {
        std::string text;
        for (unsigned size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
        return "(" + text + ")";
    };
    return fail(kInvalidPtx, "%s: parameters of the PTX and of the host build differ: sizes %s and %s", kernel.name,
                list(in_ptx).c_str(), list(on_host).c_str());
}

// Writes the reason to the caller's error log, as the PTX compiler of a driver would.
struct JitLog {
    char* errors = nullptr;
    size_t errors_bytes = 0;
    char* info = nullptr;
    size_t info_bytes = 0;
};

JitLog find_jit_log(unsigned count, const int* options, void* const* values) {
    enum { kInfoLog = 3, kInfoLogBytes = 4, kErrorLog = 5, kErrorLogBytes = 6 };
    JitLog log;
    for (unsigned i = 0; i < count; i++) {
        switch (options[i]) {
            case kInfoLog: log.info = static_cast<char*>(values[i]); break;
            case kInfoLogBytes: log.info_bytes = size_t(values[i]); break;
            case kErrorLog: log.errors = static_cast<char*>(values[i]); break;
            case kErrorLogBytes: log.errors_bytes = size_t(values[i]); break;
        }
    }
    return log;
}

}  // namespace

bool has_host_kernels() { return !host_kernels().empty(); }

}  // namespace softgpu

using namespace softgpu;

extern "C" __attribute__((visibility("default"))) void softgpu::softgpu_register(const Kernel* kernel) {
    if (host_kernels().emplace(kernel->name, kernel).second) return;
    fprintf(stderr, "softgpu: two kernels are named %s\n", kernel->name);
    abort();
}

// Names of all host kernels, one per line, for tests that compare them with PTX.
DRIVER_API const char* softgpu_kernel_names() {
    static thread_local std::string names;
    names.clear();
    for (auto& entry : host_kernels()) names += entry.first + '\n';
    return names.c_str();
}

DRIVER_API Result cuModuleLoadData(void** module, const void* image) {
    return load_module(module, static_cast<const char*>(image));
}

DRIVER_API Result cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options, void** values) {
    const JitLog log = find_jit_log(count, options, values);
    const Result result = load_module(module, static_cast<const char*>(image));
    if (log.info != nullptr && log.info_bytes > 0) log.info[0] = '\0';
    if (log.errors != nullptr && log.errors_bytes > 0) {
        snprintf(log.errors, log.errors_bytes, "%s", result == kSuccess ? "" : last_failure());
    }
    return result;
}

DRIVER_API Result cuModuleUnload(void* module) {
    catch_up_all();
    return modules().remove(module) ? kSuccess : fail(kInvalidHandle, "%p is no module, or was unloaded", module);
}

DRIVER_API Result cuModuleGetFunction(void** out, void* handle, const char* name) {
    auto module = modules().find(handle);
    if (module == nullptr) return fail(kInvalidHandle, "%p is no module, or was unloaded", handle);
    auto found = module->functions.find(name);
    if (found == module->functions.end() && module->is_binary && find_host_kernel(name) != nullptr) {
        auto function = std::make_unique<Function>();
        function->host_kernel = find_host_kernel(name);
        function->ptx.name = name;
        found = module->functions.emplace(name, std::move(function)).first;
    }
    if (found == module->functions.end()) return fail(kNotFound, "the module has no kernel named %s", name);
    Function& function = *found->second;
    if (function.host_kernel != nullptr && !module->is_binary) {
        if (Result error = check_parameters(function)) return error;
    }
    *out = &function;
    return kSuccess;
}

// `attribute` is a CUfunction_attribute.
DRIVER_API Result cuFuncGetAttribute(int* value, int attribute, void* handle) {
    const auto& function = *static_cast<const Function*>(handle);
    switch (attribute) {
        case 0: *value = int(function.ptx.max_threads); return kSuccess;          // MAX_THREADS_PER_BLOCK
        case 1: *value = int(function.ptx.static_shared_bytes); return kSuccess;  // SHARED_SIZE_BYTES
        case 2: *value = 0; return kSuccess;                                      // CONST_SIZE_BYTES
        case 3: *value = 0; return kSuccess;                                      // LOCAL_SIZE_BYTES
        case 4: *value = 32; return kSuccess;                                     // NUM_REGS
        case 5: *value = int(process_options.max_ptx); return kSuccess;           // PTX_VERSION
        case 6: *value = int(process_options.compute_capability); return kSuccess;  // BINARY_VERSION
        case 8: *value = function.max_dynamic_shared; return kSuccess;            // MAX_DYNAMIC_SHARED_SIZE_BYTES
        default: return fail(kInvalidValue, "function attribute %d is not implemented", attribute);
    }
}

DRIVER_API Result cuFuncSetAttribute(void* handle, int attribute, int value) {
    auto& function = *static_cast<Function*>(handle);
    if (attribute != 8) return kSuccess;  // the others are hints
    const int limit = shared_memory_opt_in_limit() - int(function.ptx.static_shared_bytes);
    if (value < 0 || value > limit) {
        return fail(kInvalidValue, "%s: %d bytes of dynamic shared memory asked for, %d possible",
                    function.ptx.name.c_str(), value, limit);
    }
    function.max_dynamic_shared = value;
    return kSuccess;
}

DRIVER_API Result cuFuncSetCacheConfig(void*, int) { return kSuccess; }
