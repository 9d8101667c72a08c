// Products of bytes on vectors of thirty-two-bit lanes, and the rounding of numbers to bytes. Included only
// by the bodies of kernels.
#pragma once

#include "linear_kernels.h"
#include "simd_math.h"

namespace tandem {
namespace {

inline Ints load_ints(const void* p) {
    Ints v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline Ints splat_ints(int32_t x) { return x - Ints{}; }

// The four bytes at p in every lane.
inline Ints splat_bytes(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return splat_ints(word);
}

// The numbers of sixteen bits in each lane: products of pairs, summed.
inline Ints dot_pairs(Ints a, Ints b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Ints>(
        _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<Ints>(
        _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
    return reinterpret_cast<Ints>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Adds to each lane the products of its four unsigned bytes in w with its four signed ones in x. Without an
// instruction for it the bytes become sixteen bits, even and odd ones apart: unlike the product of bytes that
// older CPUs have, that saturates nowhere.
inline Ints dot_add(Ints sums, Ints w, Ints x) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(w), reinterpret_cast<__m512i>(x)));
#elif defined(__AVXVNNI__)
    return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(
        reinterpret_cast<__m256i>(sums), reinterpret_cast<__m256i>(w), reinterpret_cast<__m256i>(x)));
#else
    using Shorts = int16_t __attribute__((vector_size(kWidth * 4)));
    const Ints even_w = w & 0x00ff00ff;
    const Ints odd_w = reinterpret_cast<Ints>(reinterpret_cast<Bits>(w) >> 8) & 0x00ff00ff;
    const Shorts pairs = reinterpret_cast<Shorts>(x);
    const auto even_x = reinterpret_cast<Ints>(static_cast<Shorts>(pairs << 8) >> 8);
    const auto odd_x = reinterpret_cast<Ints>(pairs >> 8);
    return sums + dot_pairs(even_w, even_x) + dot_pairs(odd_w, odd_x);
#endif
}

inline Vec to_floats(Ints v) { return __builtin_convertvector(v, Vec); }

inline int32_t sum_of(Ints v) {
    int32_t total = 0;
    for (int i = 0; i < kWidth; ++i) total += v[i];
    return total;
}

// The low byte of each lane.
inline void store_bytes(int8_t* p, Ints v) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#else
    for (int i = 0; i < kWidth; ++i) p[i] = static_cast<int8_t>(v[i]);
#endif
}

// NaN where not all of a row is finite, else 0.
inline float poison_of(const float* x, int64_t n) {
    Vec poison = splat(0.0f);
    for_vectors(n, [&](int64_t i, int64_t count) {
        poison = multiply_add(load_part(x + i, count), splat(0.0f), poison);
    });
    return total_of(poison);
}

// The kOutliers + 1 largest magnitudes of a row, the largest first.
struct Largest {
    float magnitudes[kOutliers + 1];
};

inline Largest largest_of(const float* x, int64_t n) {
    Vec top[kOutliers + 1];  // of each lane
    for (Vec& v : top) v = splat(0.0f);
    for_vectors(n, [&](int64_t i, int64_t count) {
        Vec v = magnitude(load_part(x + i, count));
#pragma GCC unroll 8
        for (Vec& t : top) {
            const Vec more = larger(t, v);
            v = smaller(t, v);
            t = more;
        }
    });
    float lanes[kOutliers + 2][kWidth] = {};  // zeros at the end
    for (int64_t o = 0; o <= kOutliers; ++o) store(lanes[o], top[o]);
    Largest largest;
    for (float& most : largest.magnitudes) {
        int best = 0;
        for (int lane = 1; lane < kWidth; ++lane) best = lanes[0][lane] > lanes[0][best] ? lane : best;
        most = lanes[0][best];
        for (int64_t o = 0; o <= kOutliers; ++o) lanes[o][best] = lanes[o + 1][best];
    }
    return largest;
}

// Finds a row's outliers, of equal magnitudes the first; returns the largest magnitude of all other numbers.
inline float find_outliers(const float* x, int64_t n, Outlier* outliers) {
    const Largest largest = largest_of(x, n);
    for (int64_t o = 0; o < kOutliers; ++o) outliers[o] = {0, 0.0f};
    const float most = largest.magnitudes[0], least = largest.magnitudes[kOutliers - 1];
    if (most < kOutlierRatio * largest.magnitudes[kOutliers]) return most;
    int64_t found = 0, ties = 0;
    for (int64_t o = 0; o < kOutliers; ++o) ties += largest.magnitudes[o] == least && least != 0.0f;
    for_vectors(n, [&](int64_t i, int64_t count) {
        if (!any(at_least(magnitude(load_part(x + i, count)), splat(least)))) return;
        for (int64_t k = i; k < i + count && found < kOutliers; ++k) {
            const float size = x[k] < 0.0f ? -x[k] : x[k];
            if (size > least || (size == least && ties-- > 0))
                outliers[found++] = {static_cast<int32_t>(k), x[k]};
        }
    });
    return largest.magnitudes[kOutliers];
}

// Adding 1.5 * 2^23 rounds to the nearest integer, and leaves it in the low bits.
inline Ints rounded(Vec x) { return reinterpret_cast<Ints>(x + 12582912.0f) - 0x4b400000; }

// Rows below it have no scale in float32's normal numbers; they are nothing beside any other.
constexpr float kLeastMagnitude = 0x1p-119f;

// An outlier's lane holds the largest integer until its byte is cleared.
inline Ints to_bytes(Vec v, Vec inverse) {
    const Vec scaled = v * inverse, most = splat(127.0f);
    return rounded(smaller(larger(scaled, -most), most));
}

void quantize(const float* x, int64_t width, int64_t group, const ByteRows& out, int64_t row) {
    Outlier* outliers = out.outliers + row * kOutliers;
    const float most = find_outliers(x, width, outliers), poison = poison_of(x, width);
    int8_t* bytes = out.data + row * out.stride;
    int32_t* sums = out.sums + row * out.groups;
    if (!(most + poison >= kLeastMagnitude)) {  // zeros, which a scale of NaN makes NaN of
        __builtin_memset(bytes, 0, static_cast<unsigned long>(out.stride));
        __builtin_memset(sums, 0, static_cast<unsigned long>(out.groups) * sizeof(int32_t));
        out.scales[row] = poison;
        return;
    }
    const Vec inverse = splat(127.0f / most);
    out.scales[row] = most / 127.0f;
    for (int64_t g = 0; g < out.groups; ++g) {
        const int64_t end = out.groups == 1 ? out.stride : (g + 1) * group;
        Ints total{};
        for (int64_t i = g * group; i < end; i += kWidth) {
            Vec v = splat(0.0f);
            if (i + kWidth <= width)
                v = load(x + i);
            else if (i < width)
                v = load_some(x + i, width - i);
            const Ints integers = to_bytes(v, inverse);
            store_bytes(bytes + i, integers);
            total += integers;
        }
        sums[g] = sum_of(total);
    }
    for (int64_t o = 0; o < kOutliers; ++o) {
        const int64_t k = outliers[o].input;
        if (outliers[o].value == 0.0f) continue;
        sums[out.groups == 1 ? 0 : k / group] -= bytes[k];
        bytes[k] = 0;
    }
}

}  // namespace
}  // namespace tandem
