// The body of elementwise_kernels.h, compiled once a CPU path with that path's compiler flags.
#pragma once

#include "activation_impl.h"
#include "elementwise_kernels.h"
#include "rotation_impl.h"

namespace tandem {
namespace {

template <class Function>
void activate(const float* x, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(out + i, Function::value(load(x + i)));
    if (i < n) store_some(out + i, Function::value(load_some(x + i, n - i)), n - i);
}

template <class Function>
void differentiate(const float* x, const float* grad_out, float* grad_x, int64_t n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(grad_x + i, load(grad_out + i) * Function::slope(load(x + i)));
    if (i < n)
        store_some(grad_x + i, load_some(grad_out + i, n - i) * Function::slope(load_some(x + i, n - i)),
                   n - i);
}

void rotate(const TokenHeads& token) {
    const int64_t half = token.half;
    for (int64_t head = 0; head < token.heads; ++head) {
        const float* x = token.x + head * token.head_stride;
        float* out = token.out + head * 2 * half;
        rotate_pairs(x, x + half, token.cos, token.sin, token.direction, half, out, out + half);
    }
}

// The sum of (x - center)^2; elements behind the row's end must not count.
inline float squares_about(const float* x, int64_t n, float center) {
    Vec sums = splat(0.0f);
    for_vectors(n, [&](int64_t i, int64_t count) {
        Vec d = load_part(x + i, count) - center;
        if (count < kWidth)
            for (int64_t lane = count; lane < kWidth; ++lane) d[lane] = 0.0f;
        sums = multiply_add(d, d, sums);
    });
    return total_of(sums);
}

void norm(const float* x, int64_t width, const NormWeights& weights, float* out) {
    const auto count = static_cast<float>(width);
    float mean = 0.0f;
    if (weights.subtract_mean) {
        Vec sums = splat(0.0f);
        for_vectors(width, [&](int64_t i, int64_t n) { sums += load_part(x + i, n); });
        mean = total_of(sums) / count;
    }
    const float scale = 1.0f / __builtin_sqrtf(squares_about(x, width, mean) / count + weights.eps);
    for_vectors(width, [&](int64_t i, int64_t n) {
        Vec y = (load_part(x + i, n) - mean) * scale * load_part(weights.weight + i, n);
        if (weights.bias != nullptr) y += load_part(weights.bias + i, n);
        n == kWidth ? store(out + i, y) : store_some(out + i, y, n);
    });
}

constexpr ElementwiseKernels kElementwiseKernels = {
    {activate<Gelu>, differentiate<Gelu>},
    {activate<GeluNew>, differentiate<GeluNew>},
    rotate,
    norm,
};

}  // namespace
}  // namespace tandem
