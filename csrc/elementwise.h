// Activations and rotary positions over whole tensors, in chunks on several threads.
#pragma once

#include <cstdint>

#include "elementwise_kernels.h"

namespace tandem {

void activate(const Activation& activation, const float* x, float* out, int64_t n, int num_threads);
void differentiate(const Activation& activation, const float* x, const float* grad_out, float* grad_x,
                   int64_t n, int num_threads);

// x is (batch, tokens, heads, 2 * half), its last dimension contiguous; out the same shape in one run; cos
// and sin are (tokens, half).
struct Rotation {
    const float* x;
    int64_t batch_stride, token_stride, head_stride;
    int64_t batch, tokens, heads, half;
    const float *cos, *sin;
    float direction;  // 1, or -1 to rotate back
    float* out;
};

void rotate(const Rotation& rotation, int num_threads);

}  // namespace tandem
