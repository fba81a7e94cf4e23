// Matrix products on the host, with the parameters of cublasLtMatmul.
#pragma once
#include <cstddef>
#include <cstdint>

namespace softgpu {

// cudaDataType_t
enum { kF32 = 0, kF16 = 2, kBf16 = 14 };
inline size_t element_bytes(int type) { return type == kF32 ? 4 : type == kF16 || type == kBf16 ? 2 : 0; }

// cublasLtOrder_t
enum { kColumnMajor = 0, kRowMajor = 1 };

// cublasLtEpilogue_t: bits
enum { kEpilogueNone = 1, kEpilogueRelu = 2, kEpilogueBias = 4, kEpilogueGelu = 32 };

struct Layout {
    int type = kF32;
    int order = kColumnMajor;
    uint64_t rows = 0, columns = 0;
    int64_t leading = 0;  // elements from one column (row) to the next
    int batch_count = 1;
    int64_t batch_stride = 0;  // elements

    size_t index(size_t row, size_t column) const {
        return order == kRowMajor ? row * size_t(leading) + column : column * size_t(leading) + row;
    }
    bool is_valid() const;
    // Elements from the first of the first batch to the end of the last batch.
    size_t span_bytes() const;
};

struct Descriptor {
    int compute_type = 0, scale_type = 0, pointer_mode = 0;
    int transpose_a = 0, transpose_b = 0, transpose_c = 0;
    int epilogue = kEpilogueNone;
    uint64_t bias = 0;  // one element per row of D
    int bias_type = -1;
    int64_t bias_batch_stride = 0;

    bool has_bias() const { return epilogue & kEpilogueBias; }
};

struct Operands {
    Descriptor descriptor;
    Layout a, b, c, d;

    bool shapes_agree() const;
    bool is_supported() const;
    size_t inner() const { return descriptor.transpose_a ? a.rows : a.columns; }
    int bias_type() const { return descriptor.bias_type < 0 ? d.type : descriptor.bias_type; }
};

struct Job {
    Operands operands;
    const void *a, *b, *c;
    void* d;
    float alpha, beta;
};

void multiply(const Job& job);

}  // namespace softgpu
