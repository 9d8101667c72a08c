// The body of elementwise_kernels.h, compiled once a CPU path with that path's compiler flags.
#pragma once

#include "activation_impl.h"
#include "elementwise_kernels.h"

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

inline void rotate_pair(Vec& first, Vec& second, Vec cos, Vec sin) {
    const Vec x = first, y = second;
    first = multiply_add(x, cos, -(y * sin));
    second = multiply_add(y, cos, x * sin);
}

void rotate(const TokenHeads& token) {
    const int64_t half = token.half, whole = half - half % kWidth, rest = half - whole;
    for (int64_t head = 0; head < token.heads; ++head) {
        const float* x = token.x + head * token.head_stride;
        float* out = token.out + head * 2 * half;
        for (int64_t i = 0; i < whole; i += kWidth) {
            Vec first = load(x + i), second = load(x + half + i);
            rotate_pair(first, second, load(token.cos + i), load(token.sin + i) * token.direction);
            store(out + i, first);
            store(out + half + i, second);
        }
        if (rest == 0) continue;
        Vec first = load_some(x + whole, rest), second = load_some(x + half + whole, rest);
        rotate_pair(first, second, load_some(token.cos + whole, rest),
                    load_some(token.sin + whole, rest) * token.direction);
        store_some(out + whole, first, rest);
        store_some(out + half + whole, second, rest);
    }
}

constexpr ElementwiseKernels kElementwiseKernels = {
    {activate<Gelu>, differentiate<Gelu>},
    {activate<GeluNew>, differentiate<GeluNew>},
    rotate,
};

}  // namespace
}  // namespace tandem
