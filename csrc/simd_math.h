// Arithmetic on simd.h's vectors where speed counts and bits may differ between CPU paths: fused
// multiply-adds and the exponential made of them. Included only by the bodies of kernels, like simd.h.
#pragma once

#include "simd.h"

namespace tandem {
namespace {

inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// The first n elements, zeros behind them.
inline Vec load_some(const float* p, int64_t n) {
    Vec v{};
    __builtin_memcpy(&v, p, static_cast<unsigned long>(n) * sizeof(float));
    return v;
}

inline void store_some(float* p, Vec v, int64_t n) {
    __builtin_memcpy(p, &v, static_cast<unsigned long>(n) * sizeof(float));
}

// Calls body(i, number of elements) for the vectors of a row, the last one short.
template <class Body>
inline void for_vectors(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) body(i, int64_t{kWidth});
    if (i < n) body(i, n - i);
}

inline Vec load_part(const float* p, int64_t n) { return n == kWidth ? load(p) : load_some(p, n); }

inline float total_of(Vec v) {
    float total = 0.0f;
    for (int i = 0; i < kWidth; ++i) total += v[i];
    return total;
}

inline Vec magnitude(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<Bits>(x) & 0x7fffffffu); }

inline Vec select(Mask mask, Vec chosen, Vec otherwise) {
#if defined(__AVX512F__)
    return _mm512_mask_mov_ps(otherwise, mask, chosen);
#else
    return reinterpret_cast<Vec>((reinterpret_cast<Ints>(chosen) & mask) |
                                 (reinterpret_cast<Ints>(otherwise) & ~mask));
#endif
}

// e^x for x <= 0 or barely above (rounding of a probability near 1), 0 below -87, NaN for NaN: a NaN that
// went in must come out. As exp_nonpositive in simd.h, but fused and with no promise of equal bits.
inline Vec exp_or_nan(Vec x) {
    const Vec lowest = splat(-87.0f);
    // Rounds to n, and leaves n + 127, the exponent of 2^n, in the low bits.
    const Vec shifted = multiply_add(larger(x, lowest), splat(1.44269504088896341f), splat(12583039.0f));
    const Vec n = shifted - 12583039.0f;
    const Vec y = larger(lowest, x);  // NaN stays NaN: the second operand wins
    const Vec r = multiply_add(n, splat(2.12194440054690583e-4f), multiply_add(n, splat(-0.693359375f), y));
    Vec p = multiply_add(r, splat(1.0f / 5040), splat(1.0f / 720));
    p = multiply_add(p, r, splat(1.0f / 120));
    p = multiply_add(p, r, splat(1.0f / 24));
    p = multiply_add(p, r, splat(1.0f / 6));
    p = multiply_add(p, r, splat(0.5f));
    p = multiply_add(p * r, r, r) + 1.0f;
    const Vec result = p * reinterpret_cast<Vec>(reinterpret_cast<Bits>(shifted) << 23);
#if defined(__AVX512F__)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ), result);
#else
    return keep_where(~(x < lowest), result);
#endif
}

}  // namespace
}  // namespace tandem
