// Activations, rotary positions and norms over a run of floats: one implementation a CPU path.
#pragma once

#include <cstdint>

namespace tandem {

struct Activation {
    void (*forward)(const float* x, float* out, int64_t n);
    void (*backward)(const float* x, const float* grad_out, float* grad_x, int64_t n);
};

// One token's heads of 2 * half floats: element i of the first half pairs with element i of the second.
struct TokenHeads {
    const float* x;
    int64_t head_stride;
    float* out;  // heads in one run
    const float *cos, *sin;
    int64_t heads, half;
    float direction;  // 1, or -1 to rotate back
};

// LayerNorm (arXiv:1607.06450) or, without a mean, RMSNorm (arXiv:1910.07467) of a row.
struct NormWeights {
    const float* weight;  // (width,)
    const float* bias;    // null: none
    float eps;
    bool subtract_mean;
};

struct ElementwiseKernels {
    Activation gelu, gelu_new;
    void (*rotate)(const TokenHeads& token);
    // In place is allowed.
    void (*norm)(const float* x, int64_t width, const NormWeights& weights, float* out);
};

extern const ElementwiseKernels kGenericElementwiseKernels;
#if defined(__x86_64__)
extern const ElementwiseKernels kAvx2ElementwiseKernels;
extern const ElementwiseKernels kAvx512ElementwiseKernels;
#endif

// The kernels of cpu_path().
const ElementwiseKernels& elementwise_kernels();

}  // namespace tandem
