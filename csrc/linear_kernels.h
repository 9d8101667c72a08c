// A linear layer over some rows and one chunk of outputs: one implementation a CPU path.
//
// An output is summed in order of its inputs, in one chain or, where weights are in eight or four bits,
// exactly as integers; so its bits do not depend on the rows that are computed beside it.
#pragma once

#include <cstdint>

#include "packed_matrix.h"

namespace tandem {

enum class ActivationKind { none, relu, gelu, gelu_new, silu };

// Rows rounded to eight bits, value = scale * integer, each row filled up with zeros to a multiple of
// kDepthUnit, and their number to a multiple of kRowUnit by rows of anything.
constexpr int64_t kRowUnit = 32;

// Where a row's largest number is so many times the one behind its few largest, those are not rounded but
// multiplied as floats, or they would leave few bits to the others: what LLM.int8 (arXiv:2208.07339) does for
// columns, a row at a time.
constexpr int64_t kOutliers = 4;
constexpr float kOutlierRatio = 1.5f;

struct Outlier {
    int32_t input;
    float value;  // 0: none, nor any after it
};

struct ByteRows {
    int8_t* data;
    int64_t stride;
    float* scales;      // (rows,)
    int32_t* sums;      // (rows, groups): of the integers of each group of inputs
    int64_t groups;     // 1 where weights have one scale an output
    Outlier* outliers;  // (rows, kOutliers), whose bytes are 0
};

struct FloatRows {
    const float* data;
    int64_t stride;
};

// out = activation(product + bias) + residual. A gated layer's chunk holds 32 gates and then their 32
// factors, and gives activation(gates) * factors.
struct Epilogue {
    const float* bias;  // (chunks * kChunk,) in the order of the packed outputs; null: none
    ActivationKind activation;
    bool gated;
    const float* residual;  // null: none; may be out
    int64_t residual_stride;
    float* out;
    int64_t out_stride;
};

struct LinearBatch {
    const PackedMatrix* weight;
    FloatRows x;     // for float kinds, and int4 with x.data: its weights are then widened
    ByteRows bytes;  // for int8 and int4
    Epilogue epilogue;
    const PackedMatrix* then;  // the weight that is read after this one; null: none known
};

// Memory that will be read next: fetched, piece by piece, while something else is computed. Null: nothing.
struct Upcoming {
    const uint8_t* data;
    int64_t size;
};

struct LinearKernels {
    void (*product)(const LinearBatch& batch, int64_t first_row, int64_t rows, int64_t chunk,
                    Upcoming upcoming);
    // Rounds a row (width,) to eight bits, in groups of `group` inputs for the sums, with zeros up to
    // out.stride.
    void (*quantize)(const float* x, int64_t width, int64_t group, const ByteRows& out, int64_t row);
};

extern const LinearKernels kGenericLinearKernels;
#if defined(__x86_64__)
extern const LinearKernels kAvx2LinearKernels;
extern const LinearKernels kAvx2VnniLinearKernels;
extern const LinearKernels kAvx512LinearKernels;
extern const LinearKernels kAvx512VnniLinearKernels;
extern const LinearKernels kAmxLinearKernels;
#endif

// The kernels of cpu_path().
const LinearKernels& linear_kernels();

}  // namespace tandem
