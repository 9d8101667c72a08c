// What becomes of a product's sums: bias, activation, gate and residual, on the way to memory.
#pragma once

#include "activation_impl.h"
#include "linear_kernels.h"

namespace tandem {
namespace {

template <class Function>
void activate_sums(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += kWidth) store(x + i, Function::value(load(x + i)));
}

inline void activate_sums(ActivationKind kind, float* x, int64_t n) {
    switch (kind) {
        case ActivationKind::relu:
            return activate_sums<Relu>(x, n);
        case ActivationKind::gelu:
            return activate_sums<Gelu>(x, n);
        case ActivationKind::gelu_new:
            return activate_sums<GeluNew>(x, n);
        case ActivationKind::silu:
            return activate_sums<Silu>(x, n);
        case ActivationKind::none:
            return;
    }
}

// A row's sums (kChunk,), which are overwritten, to its place in the output.
inline void finish_row(const Epilogue& e, float* sums, int64_t row, int64_t chunk, int64_t outputs) {
    if (e.bias != nullptr)
        for (int64_t i = 0; i < kChunk; i += kWidth)
            store(sums + i, load(sums + i) + load(e.bias + chunk * kChunk + i));
    const int64_t width = e.gated ? kChunk / 2 : kChunk;
    activate_sums(e.activation, sums, width);
    if (e.gated)
        for (int64_t i = 0; i < width; i += kWidth) store(sums + i, load(sums + i) * load(sums + width + i));
    const int64_t first = chunk * width, total = e.gated ? outputs / 2 : outputs;
    const int64_t count = first + width <= total ? width : total - first;
    float* out = e.out + row * e.out_stride + first;
    if (e.residual != nullptr) {
        const float* residual = e.residual + row * e.residual_stride + first;
        for (int64_t i = 0; i < count; i += kWidth)
            store(sums + i, load(sums + i) + (i + kWidth <= count ? load(residual + i)
                                                                  : load_some(residual + i, count - i)));
    }
    if (count == width)
        for (int64_t i = 0; i < width; i += kWidth) store(out + i, load(sums + i));
    else
        __builtin_memcpy(out, sums, static_cast<unsigned long>(count) * sizeof(float));
}

}  // namespace
}  // namespace tandem
