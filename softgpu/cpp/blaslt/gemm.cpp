#include "gemm.h"

#include <cmath>
#include <vector>

#include "../include/cuda_bf16.h"
#include "../include/cuda_fp16.h"

namespace softgpu {

bool Layout::is_valid() const {
    if (element_bytes(type) == 0 || (order != kColumnMajor && order != kRowMajor)) return false;
    return leading >= int64_t(order == kRowMajor ? columns : rows) && batch_count >= 1;
}

size_t Layout::span_bytes() const {
    if (rows == 0 || columns == 0) return 0;
    const size_t last = size_t(batch_count - 1) * size_t(batch_stride) + index(rows - 1, columns - 1);
    return (last + 1) * element_bytes(type);
}

bool Operands::shapes_agree() const {
    const uint64_t m = descriptor.transpose_a ? a.columns : a.rows;
    const uint64_t k = descriptor.transpose_a ? a.rows : a.columns;
    const uint64_t k_of_b = descriptor.transpose_b ? b.columns : b.rows;
    const uint64_t n = descriptor.transpose_b ? b.rows : b.columns;
    return k == k_of_b && d.rows == m && d.columns == n && c.rows == m && c.columns == n &&
           a.batch_count == d.batch_count && b.batch_count == d.batch_count && c.batch_count == d.batch_count &&
           a.is_valid() && b.is_valid() && c.is_valid() && d.is_valid();
}

bool Operands::is_supported() const {
    enum { kHostPointers = 0, kCompute32F = 68, kCompute32FPedantic = 69, kCompute32FFastTf32 = 77 };
    const int compute = descriptor.compute_type;
    const int activation = descriptor.epilogue & ~(kEpilogueNone | kEpilogueBias);
    return a.type == b.type && c.type == d.type && (d.type == a.type || d.type == kF32) && !descriptor.transpose_c &&
           descriptor.pointer_mode == kHostPointers && descriptor.scale_type == kF32 &&
           (compute == kCompute32F || compute == kCompute32FPedantic || compute == kCompute32FFastTf32) &&
           (activation == 0 || activation == kEpilogueRelu || activation == kEpilogueGelu) &&
           element_bytes(bias_type()) != 0;
}

static float load(const void* data, size_t index, int type) {
    switch (type) {
        case kBf16: return bf16_to_float(static_cast<const uint16_t*>(data)[index]);
        case kF16: return half_to_float(static_cast<const uint16_t*>(data)[index]);
        default: return static_cast<const float*>(data)[index];
    }
}

static void store(void* data, size_t index, int type, float value) {
    switch (type) {
        case kBf16: static_cast<uint16_t*>(data)[index] = float_to_bf16(value); break;
        case kF16: static_cast<uint16_t*>(data)[index] = float_to_half(value); break;
        default: static_cast<float*>(data)[index] = value;
    }
}

// One batch of an operand as floats, the summed index innermost: packed[outer * inner_count + inner].
static void pack(std::vector<float>& packed, const Layout& layout, const void* data, int batch, bool inner_is_row) {
    const size_t outer_count = inner_is_row ? layout.columns : layout.rows;
    const size_t inner_count = inner_is_row ? layout.rows : layout.columns;
    const size_t first = size_t(batch) * size_t(layout.batch_stride);
    packed.resize(outer_count * inner_count);
    for (size_t outer = 0; outer < outer_count; outer++) {
        for (size_t inner = 0; inner < inner_count; inner++) {
            const size_t index = inner_is_row ? layout.index(inner, outer) : layout.index(outer, inner);
            packed[outer * inner_count + inner] = load(data, first + index, layout.type);
        }
    }
}

// 32 partial sums, which the compiler keeps in vector registers. Their order is fixed and no operation is fused, so the
// result does not depend on the register width.
__attribute__((target_clones("avx2", "default"))) static float dot(const float* x, const float* y, size_t count) {
    constexpr size_t kLanes = 32;
    float sums[kLanes] = {};
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (size_t lane = 0; lane < kLanes; lane++) sums[lane] += x[i + lane] * y[i + lane];
    }
    float total = 0;
    for (; i < count; i++) total += x[i] * y[i];
    for (float sum : sums) total += sum;
    return total;
}

static float activate(float x, int epilogue) {
    if (epilogue & kEpilogueRelu) return x > 0 ? x : 0;
    // The tanh form, as in cuBLASLt.
    if (epilogue & kEpilogueGelu) return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    return x;
}

static void multiply_batch(const Job& job, int batch, const std::vector<float>& a, const std::vector<float>& b) {
    const Operands& op = job.operands;
    const Descriptor& descriptor = op.descriptor;
    const size_t inner = op.inner();
    const void* bias = reinterpret_cast<const void*>(descriptor.bias);
    const auto offset = [&](const Layout& layout, size_t row, size_t column) {
        return size_t(batch) * size_t(layout.batch_stride) + layout.index(row, column);
    };
    for (size_t column = 0; column < op.d.columns; column++) {
        for (size_t row = 0; row < op.d.rows; row++) {
            float value = job.alpha * dot(&a[row * inner], &b[column * inner], inner);
            if (job.beta != 0) value += job.beta * load(job.c, offset(op.c, row, column), op.c.type);
            if (descriptor.has_bias()) {
                value += load(bias, size_t(batch) * size_t(descriptor.bias_batch_stride) + row, op.bias_type());
            }
            store(job.d, offset(op.d, row, column), op.d.type, activate(value, descriptor.epilogue));
        }
    }
}

void multiply(const Job& job) {
    const Operands& op = job.operands;
    std::vector<float> a, b;
    for (int batch = 0; batch < op.d.batch_count; batch++) {
        pack(a, op.a, job.a, batch, op.descriptor.transpose_a != 0);
        pack(b, op.b, job.b, batch, op.descriptor.transpose_b == 0);
        multiply_batch(job, batch, a, b);
    }
}

}  // namespace softgpu
