// Products of float32 rows with a chunk of weights, which are float32 or become so on their way into a
// register.
#pragma once

#include "prefetch_impl.h"
#include "simd_math.h"

namespace tandem {
namespace {

// Accumulators, a vector of weights each and a number of x fill the registers: 29 of 32, or 15 of 16.
constexpr int kFloatRows = 6;
#if defined(__AVX512F__)
constexpr int kFloatVecs = 4;
#else
constexpr int kFloatVecs = 2;
#endif
// One row alone reads all of a chunk at once, in the order of memory.
constexpr int kChunkVecs = static_cast<int>(kChunk) / kWidth;
constexpr int kLoneVecs = kChunkVecs < 8 ? kChunkVecs : 8;

struct Float32Weights {
    using Number = float;
    static Vec load_vec(const float* p) { return load(p); }
};

#if defined(__AVX512F__)
using Halves = __m256i;
inline Halves load_halves(const uint16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Vec from_bfloat(Halves h) {
    return reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline Vec from_half(Halves h) { return _mm512_cvtph_ps(h); }
#elif defined(__AVX2__)
using Halves = __m128i;
inline Halves load_halves(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline Vec from_bfloat(Halves h) {
    return reinterpret_cast<Vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline Vec from_half(Halves h) { return _mm256_cvtph_ps(h); }
#else
using Halves = const uint16_t*;
inline Halves load_halves(const uint16_t* p) { return p; }
inline Vec from_bfloat(Halves h) {
    Bits bits;
    for (int i = 0; i < kWidth; ++i) bits[i] = static_cast<uint32_t>(h[i]) << 16;
    return reinterpret_cast<Vec>(bits);
}
// The exponent moves by 112 in a product with 2^112, which subnormal halves survive; an infinite one stays
// so.
inline Vec from_half(Halves h) {
    Bits bits;
    for (int i = 0; i < kWidth; ++i) bits[i] = h[i];
    const Bits magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    const Vec scaled = reinterpret_cast<Vec>(magnitude) * 0x1p112f;
    const Bits special = reinterpret_cast<Bits>(magnitude >= 0x0f800000u) & 0x7f800000u;
    return reinterpret_cast<Vec>(reinterpret_cast<Bits>(scaled) | special | sign);
}
#endif

struct BFloat16Weights {
    using Number = uint16_t;
    static Vec load_vec(const uint16_t* p) { return from_bfloat(load_halves(p)); }
};

struct Float16Weights {
    using Number = uint16_t;
    static Vec load_vec(const uint16_t* p) { return from_half(load_halves(p)); }
};

constexpr int64_t kFloatStep = 2;  // inputs between two looks at what is to be fetched

// Where loops over the accumulators are not unrolled to the last, GCC 12 keeps them on the stack around the
// loop.
//
// Sums of kRows rows of x with kVecs vectors of weights over `depth` inputs, into sums (kRows, kChunk);
// kExtend goes on from what is there.
template <class Weights, int kRows, int kVecs, bool kExtend>
void float_tile(FloatRows x, const typename Weights::Number* weights, int64_t depth, Prefetcher& ahead,
                float* sums) {
    Vec totals[kRows][kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int n = 0; n < kVecs; ++n)
            totals[i][n] = kExtend ? load(sums + i * kChunk + n * kWidth) : splat(0.0f);
    const auto add = [&](int64_t k) {
        Vec row[kVecs];
        for (int n = 0; n < kVecs; ++n) row[n] = Weights::load_vec(weights + k * kChunk + n * kWidth);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const Vec number = splat(x.data[i * x.stride + k]);
#pragma GCC unroll 16
            for (int n = 0; n < kVecs; ++n) totals[i][n] = multiply_add(number, row[n], totals[i][n]);
        }
    };
    int64_t k = 0;
    for (; k + kFloatStep <= depth; k += kFloatStep) {
        ahead.step();
        for (int64_t i = 0; i < kFloatStep; ++i) add(k + i);
    }
    for (; k < depth; ++k) add(k);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int n = 0; n < kVecs; ++n) store(sums + i * kChunk + n * kWidth, totals[i][n]);
}

template <class Weights, int kRows, bool kExtend>
void float_rows(FloatRows x, const typename Weights::Number* weights, int64_t depth, Prefetcher& ahead,
                float* sums) {
    constexpr int kVecs = kRows == 1 ? kLoneVecs : kFloatVecs;
    for (int n = 0; n < kChunkVecs; n += kVecs)
        float_tile<Weights, kRows, kVecs, kExtend>(x, weights + n * kWidth, depth, ahead, sums + n * kWidth);
}

// As float_rows for a number of rows that is known at run time, kFloatRows at most.
template <class Weights, bool kExtend>
void float_product(FloatRows x, int64_t rows, const typename Weights::Number* weights, int64_t depth,
                   Prefetcher& ahead, float* sums) {
    switch (rows) {
        case 1:
            return float_rows<Weights, 1, kExtend>(x, weights, depth, ahead, sums);
        case 2:
            return float_rows<Weights, 2, kExtend>(x, weights, depth, ahead, sums);
        case 3:
            return float_rows<Weights, 3, kExtend>(x, weights, depth, ahead, sums);
        case 4:
            return float_rows<Weights, 4, kExtend>(x, weights, depth, ahead, sums);
        case 5:
            return float_rows<Weights, 5, kExtend>(x, weights, depth, ahead, sums);
        default:
            return float_rows<Weights, 6, kExtend>(x, weights, depth, ahead, sums);
    }
}

}  // namespace
}  // namespace tandem
