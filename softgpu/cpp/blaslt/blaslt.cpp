// cublasLtMatmul on the host: descriptors, checks, and the call.
//
// D = activation(alpha * op(A) * op(B) + beta * C + bias), per batch, in the storage orders and types below.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#include "gemm.h"

#define BLAS_API extern "C" __attribute__((visibility("default")))

// Functions of the driver's library
extern "C" int softgpu_submit(void* stream, int (*run)(void*), void* job, void (*drop)(void*));
extern "C" int softgpu_check_range(uint64_t address, size_t bytes, const char* what);

using namespace softgpu;

// Rust reads these as an enum: return only listed values.
enum Status : int { kOk = 0, kInvalid = 7, kExecutionFailed = 13, kUnsupported = 15 };

struct Preference {
    uint64_t max_workspace_bytes = 0;
};

// cublasLtMatmulHeuristicResult_t
struct HeuristicResult {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};

BLAS_API Status cublasLtCreate(void** handle) {
    *handle = new int(0);
    return kOk;
}

BLAS_API Status cublasLtDestroy(void* handle) {
    delete static_cast<int*>(handle);
    return kOk;
}

BLAS_API Status cublasLtMatrixLayoutCreate(void** out, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    auto layout = std::make_unique<Layout>();
    layout->type = type;
    layout->rows = rows;
    layout->columns = columns;
    layout->leading = leading;
    *out = layout.release();
    return kOk;
}

BLAS_API Status cublasLtMatrixLayoutDestroy(void* layout) {
    delete static_cast<Layout*>(layout);
    return kOk;
}

BLAS_API Status cublasLtMatmulDescCreate(void** out, int compute_type, int scale_type) {
    auto descriptor = std::make_unique<Descriptor>();
    descriptor->compute_type = compute_type;
    descriptor->scale_type = scale_type;
    *out = descriptor.release();
    return kOk;
}

BLAS_API Status cublasLtMatmulDescDestroy(void* descriptor) {
    delete static_cast<Descriptor*>(descriptor);
    return kOk;
}

BLAS_API Status cublasLtMatmulPreferenceCreate(void** out) {
    *out = new Preference;
    return kOk;
}

BLAS_API Status cublasLtMatmulPreferenceDestroy(void* preference) {
    delete static_cast<Preference*>(preference);
    return kOk;
}

template <class T> static Status assign(T& field, const void* value, size_t bytes) {
    if (bytes < sizeof(T)) return kInvalid;
    memcpy(&field, value, sizeof(T));
    return kOk;
}

BLAS_API Status cublasLtMatrixLayoutSetAttribute(void* handle, int attribute, const void* value, size_t bytes) {
    Layout& layout = *static_cast<Layout*>(handle);
    switch (attribute) {
        case 0: return assign(layout.type, value, bytes);
        case 1: return assign(layout.order, value, bytes);
        case 2: return assign(layout.rows, value, bytes);
        case 3: return assign(layout.columns, value, bytes);
        case 4: return assign(layout.leading, value, bytes);
        case 5: return assign(layout.batch_count, value, bytes);
        case 6: return assign(layout.batch_stride, value, bytes);
        default: return kUnsupported;
    }
}

BLAS_API Status cublasLtMatmulDescSetAttribute(void* handle, int attribute, const void* value, size_t bytes) {
    Descriptor& descriptor = *static_cast<Descriptor*>(handle);
    switch (attribute) {
        case 0: return assign(descriptor.compute_type, value, bytes);
        case 1: return assign(descriptor.scale_type, value, bytes);
        case 2: return assign(descriptor.pointer_mode, value, bytes);
        case 3: return assign(descriptor.transpose_a, value, bytes);
        case 4: return assign(descriptor.transpose_b, value, bytes);
        case 5: return assign(descriptor.transpose_c, value, bytes);
        case 7: return assign(descriptor.epilogue, value, bytes);
        case 8: return assign(descriptor.bias, value, bytes);
        case 10: return assign(descriptor.bias_batch_stride, value, bytes);
        case 26: return assign(descriptor.bias_type, value, bytes);
        default: return kUnsupported;
    }
}

BLAS_API Status cublasLtMatmulPreferenceSetAttribute(void* handle, int attribute, const void* value, size_t bytes) {
    if (attribute == 1) return assign(static_cast<Preference*>(handle)->max_workspace_bytes, value, bytes);
    return kOk;  // the others restrict the choice of an algorithm; there is only one
}

BLAS_API Status cublasLtMatmulAlgoGetHeuristic(void*, void* descriptor, void* a, void* b, void* c, void* d, void*,
                                               int wanted, HeuristicResult* results, int* found) {
    *found = 0;
    if (wanted < 1) return kInvalid;
    const Operands operands{*static_cast<Descriptor*>(descriptor), *static_cast<Layout*>(a), *static_cast<Layout*>(b),
                            *static_cast<Layout*>(c), *static_cast<Layout*>(d)};
    if (!operands.shapes_agree()) return kInvalid;
    if (!operands.is_supported()) return kUnsupported;
    memset(results, 0, sizeof *results);
    results->waves = 1;
    *found = 1;
    return kOk;
}

static bool is_readable(const Layout& layout, const void* data, const char* what) {
    return softgpu_check_range(uint64_t(data), layout.span_bytes(), what) == 0;
}

static bool operands_are_in_memory(const Job& job) {
    const Operands& op = job.operands;
    if (!is_readable(op.a, job.a, "matmul A") || !is_readable(op.b, job.b, "matmul B")) return false;
    if (!is_readable(op.d, job.d, "matmul D")) return false;
    if (job.beta != 0 && !is_readable(op.c, job.c, "matmul C")) return false;
    if (!op.descriptor.has_bias()) return true;
    const int64_t batches = op.d.batch_count - 1;
    const size_t elements = size_t(batches * op.descriptor.bias_batch_stride) + op.d.rows;
    return softgpu_check_range(op.descriptor.bias, elements * element_bytes(op.bias_type()), "matmul bias") == 0;
}

// Checked again when the work runs: in a graph that is later, and the memory may have been freed.
static int run_job(void* user) {
    const Job& job = *static_cast<const Job*>(user);
    if (!operands_are_in_memory(job)) return 1;  // CUDA_ERROR_INVALID_VALUE
    multiply(job);
    return 0;
}

static void drop_job(void* job) { delete static_cast<Job*>(job); }

BLAS_API Status cublasLtMatmul(void*, void* descriptor, const void* alpha, const void* a, void* a_layout, const void* b,
                               void* b_layout, const void* beta, const void* c, void* c_layout, void* d, void* d_layout,
                               const void*, void* workspace, size_t workspace_bytes, void* stream) {
    auto job = std::make_unique<Job>(Job{
        {*static_cast<Descriptor*>(descriptor), *static_cast<Layout*>(a_layout), *static_cast<Layout*>(b_layout),
         *static_cast<Layout*>(c_layout), *static_cast<Layout*>(d_layout)},
        a, b, c, d, *static_cast<const float*>(alpha), *static_cast<const float*>(beta)});
    if (!job->operands.shapes_agree()) return kInvalid;
    if (!job->operands.is_supported()) return kUnsupported;
    if (!operands_are_in_memory(*job)) return kInvalid;
    if (softgpu_check_range(uint64_t(workspace), workspace_bytes, "matmul workspace") != 0) return kInvalid;
    return softgpu_submit(stream, run_job, job.release(), drop_job) == 0 ? kOk : kExecutionFailed;
}
