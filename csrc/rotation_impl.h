// Pairs of numbers turned by their angles, compiled once a CPU path.
#pragma once

#include "simd_math.h"

namespace tandem {
namespace {

inline void rotate_pair(Vec& first, Vec& second, Vec cos, Vec sin) {
    const Vec x = first, y = second;
    first = multiply_add(x, cos, -(y * sin));
    second = multiply_add(y, cos, x * sin);
}

// Element i of `first` with element i of `second`, n of each, into out_first and out_second; in place is
// allowed. direction is 1, or -1 to rotate back.
inline void rotate_pairs(const float* first, const float* second, const float* cos, const float* sin,
                         float direction, int64_t n, float* out_first, float* out_second) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        Vec x = load(first + i), y = load(second + i);
        rotate_pair(x, y, load(cos + i), load(sin + i) * direction);
        store(out_first + i, x);
        store(out_second + i, y);
    }
    if (i == n) return;
    Vec x = load_some(first + i, n - i), y = load_some(second + i, n - i);
    rotate_pair(x, y, load_some(cos + i, n - i), load_some(sin + i, n - i) * direction);
    store_some(out_first + i, x, n - i);
    store_some(out_second + i, y, n - i);
}

}  // namespace
}  // namespace tandem
