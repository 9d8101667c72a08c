// Sixteen floats at a time, in as many vectors as the file's target needs. Included only by the bodies of
// kernels (*_impl.h), and so compiled once a CPU path: everything is in an unnamed namespace and nothing of
// the standard library is called, or the linker might keep one path's copy of a shared function for all of
// them.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "row_kernels.h"

namespace tandem {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = static_cast<int>(kLanes) / kWidth;

using Vec = float __attribute__((vector_size(kWidth * 4)));
using Ints = int32_t __attribute__((vector_size(kWidth * 4)));
using Bits = uint32_t __attribute__((vector_size(kWidth * 4)));

struct Lanes {
    Vec part[kParts];
};

// x - 0 is x whatever its sign, so nothing is left of the subtraction but the broadcast.
inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
    return __builtin_ia32_maxps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline Vec smaller(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
    return __builtin_ia32_minps(a, b);
#else
    return a < b ? a : b;
#endif
}

// One bit, or one mask, a lane: which lanes satisfy a comparison.
#if defined(__AVX512F__)
using Mask = __mmask16;
inline Mask at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask below(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask either_nan(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
inline Mask either(Mask a, Mask b) { return _kor_mask16(a, b); }
inline Mask both(Mask a, Mask b) { return _kand_mask16(a, b); }
inline Vec keep_where(Mask mask, Vec v) { return _mm512_maskz_mov_ps(mask, v); }
inline int64_t count(Mask mask) { return __builtin_popcount(mask); }
inline bool any(Mask mask) { return mask != 0; }
#else
using Mask = Ints;
inline Mask at_least(Vec a, Vec b) { return a >= b; }
inline Mask either_nan(Vec a, Vec b) { return (a != a) | (b != b); }
inline Mask either(Mask a, Mask b) { return a | b; }
inline Mask both(Mask a, Mask b) { return a & b; }
inline Vec keep_where(Mask mask, Vec v) { return reinterpret_cast<Vec>(reinterpret_cast<Ints>(v) & mask); }
inline int64_t count(Mask mask) {
    int32_t total = 0;
    for (int i = 0; i < kWidth; ++i) total -= mask[i];
    return total;
}
#if defined(__AVX2__)
inline bool any(Mask mask) { return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0; }
#elif defined(__SSE2__)
inline bool any(Mask mask) { return _mm_movemask_ps(reinterpret_cast<__m128>(mask)) != 0; }
#else
inline bool any(Mask mask) { return count(mask) != 0; }
#endif
#endif

// e^x for x <= 0 (-inf too), 0 below -87; relative error about 2e-7. x = n ln 2 + r with |r| <= ln 2 / 2; e^r
// is its Taylor polynomial of degree 7 (remainder 5e-9); adding 1.5 * 2^23 rounds to n and leaves n in the
// low bits.
inline Vec exp_nonpositive(Vec x) {
    const Vec lowest = splat(-87.0f);
    const Vec y = larger(x, lowest);
    const Vec shifted = y * 1.44269504088896341f + 12582912.0f;
    const Vec n = shifted - 12582912.0f;
    const Vec r = (y - n * 0.693359375f) - n * -2.12194440054690583e-4f;
    Vec p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = (p * r) * r + r + 1.0f;
    const Vec result =
        reinterpret_cast<Vec>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23));
    return keep_where(at_least(x, lowest), result);
}

inline Lanes splat_lanes(float x) {
    Lanes lanes;
    for (Vec& part : lanes.part) part = splat(x);
    return lanes;
}

// The lanes made one, as a tree: 8 and 8, 4 and 4, 2 and 2, 1 and 1.
template <class OnVecs, class OnFloats>
inline float fold(Lanes lanes, OnVecs on_vecs, OnFloats on_floats) {
    for (int half = kParts / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes.part[i] = on_vecs(lanes.part[i], lanes.part[i + half]);
    float x[kWidth];
    store(x, lanes.part[0]);
    for (int half = kWidth / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x[i] = on_floats(x[i], x[i + half]);
    return x[0];
}

inline float sum_of(const Lanes& lanes) {
#if defined(__AVX512F__)
    const __m512 v = lanes.part[0];  // the same tree without leaving the registers
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    return fold(lanes, [](Vec a, Vec b) { return a + b; }, [](float a, float b) { return a + b; });
#endif
}

inline float max_of(const Lanes& lanes) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(lanes.part[0]);
#else
    return fold(lanes, larger, [](float a, float b) { return a < b ? b : a; });
#endif
}

}  // namespace
}  // namespace tandem
