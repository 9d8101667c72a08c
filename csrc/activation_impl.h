// Activations of a vector, and their slopes where training needs them. Included only by the bodies of
// kernels.
#pragma once

#include "simd_math.h"

namespace tandem {
namespace {

// A standard normal variable: the chance that it is below x, and its density at x.
struct Normal {
    Vec below, density;
};

// Both need e^(-x^2/2). The tail beyond |x| is that times a smooth function of |x| (half of erfcx(|x|/sqrt
// 2)): a polynomial in 1 / (1 + 0.35 |x|), fitted to a relative error of 3e-8, so small chances are right
// too.
inline Normal normal(Vec x) {
    const Vec a = magnitude(x);
    const Vec power = exp_or_nan(a * a * -0.5f);
    const Vec w = 1.0f / multiply_add(a, splat(0.35f), splat(1.0f));
    Vec p = multiply_add(w, splat(-2.91479919e-2f), splat(0.143980756f));
    p = multiply_add(p, w, splat(-0.255730957f));
    p = multiply_add(p, w, splat(0.159190878f));
    p = multiply_add(p, w, splat(-2.31197234e-2f));
    p = multiply_add(p, w, splat(0.105511509f));
    p = multiply_add(p, w, splat(0.119832151f));
    p = multiply_add(p, w, splat(0.139861941f));
    p = multiply_add(p, w, splat(0.139621407f));
    const Vec tail = p * w * power;
    return {select(at_least(x, splat(0.0f)), 1.0f - tail, tail), power * 0.398942280f};
}

// 0.5 (1 + tanh u) is sigmoid(2 u); u is sqrt(2 / pi) (x + 0.044715 x^3). Beyond 10 the sigmoid is 0 or 1 in
// float32; stopping there keeps the cube finite.
struct Sigmoid {
    Vec value, slope;
};

inline Sigmoid tanh_gate(Vec x) {
    const Vec a = -larger(splat(-10.0f), -magnitude(x));  // NaN stays NaN: the second operand wins
    const Vec square = a * a;
    const Vec power = exp_or_nan(-a * multiply_add(square, splat(0.0713548163f), splat(1.59576912f)));
    const Vec large = 1.0f / (1.0f + power), small = power * large;
    const Vec inner_slope = multiply_add(square, splat(0.214064449f), splat(1.59576912f));
    return {select(at_least(x, splat(0.0f)), large, small), large * small * inner_slope};
}

struct Gelu {
    static Vec value(Vec x) { return x * normal(x).below; }
    static Vec slope(Vec x) {
        const Normal n = normal(x);
        return multiply_add(x, n.density, n.below);
    }
};

struct GeluNew {
    static Vec value(Vec x) { return x * tanh_gate(x).value; }
    static Vec slope(Vec x) {
        const Sigmoid s = tanh_gate(x);
        return multiply_add(x, s.slope, s.value);
    }
};

struct Relu {
    static Vec value(Vec x) { return larger(splat(0.0f), x); }  // NaN stays NaN: the second operand wins
};

struct Silu {
    static Vec value(Vec x) {
        const Vec power = exp_or_nan(-magnitude(x));
        const Vec large = 1.0f / (1.0f + power);
        return x * select(at_least(x, splat(0.0f)), large, power * large);
    }
};

}  // namespace
}  // namespace tandem
