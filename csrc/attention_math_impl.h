// The elementwise and in-register steps of attention, compiled once a CPU path.
#pragma once

#include "matrix_product_impl.h"

namespace tandem {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = __FLT_MAX__;

// max + ln(sum), for a sum that is 0 (then -inf) or at least about 1. sum = 2^n m with m in [0.707, 1.414);
// ln m is 2 artanh((m - 1) / (m + 1)), whose series is cut where it is below 2e-9.
inline Vec log_sum_exp(Vec max, Vec sum) {
    const Ints bits = reinterpret_cast<Ints>(sum);
    const Ints n = (bits - 0x3f3504f3) >> 23;
    const Vec m = reinterpret_cast<Vec>(bits - (n << 23));
    const Vec s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
    Vec p = multiply_add(s2, splat(2.0f / 9), splat(2.0f / 7));
    p = multiply_add(p, s2, splat(2.0f / 5));
    p = multiply_add(p, s2, splat(2.0f / 3));
    p = multiply_add(p * s2, s, s * 2.0f);
    const Vec log = multiply_add(__builtin_convertvector(n, Vec), splat(0.69314718055994531f), p);
    return select(at_least(splat(0.0f), sum), splat(-kInfinity), select(at_least(sum, sum), max + log, sum));
}

// a . b over n floats, n a multiple of kLanes.
inline float dot(const float* a, const float* b, int64_t n) {
    Lanes lanes = splat_lanes(0.0f);
    for (int64_t i = 0; i < n; i += kLanes)
        for (int p = 0; p < kParts; ++p)
            lanes.part[p] = multiply_add(load(a + i + p * kWidth), load(b + i + p * kWidth), lanes.part[p]);
    return sum_of(lanes);
}

// Four floats from each of four rows, times factor, to four rows of four.
inline void transpose_4x4(const float* from, int64_t from_stride, float factor, float* to,
                          int64_t to_stride) {
#if defined(__SSE2__)
    __m128 row[4];
    for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_ps(from + i * from_stride);
    _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
    for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * to_stride, _mm_mul_ps(row[i], _mm_set1_ps(factor)));
#else
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * from_stride + j] * factor;
#endif
}

}  // namespace
}  // namespace tandem
