// A token's way into the cache: rotated, converted, and laid down in its page. Compiled once a CPU path.
#pragma once

#include "cached_attention_kernels.h"
#include "cached_products_impl.h"
#include "rotation_impl.h"

namespace tandem {
namespace {

inline Vec magnitude_of(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<Bits>(x) & 0x7fffffffu); }

// Rounded to the nearest, ties to even; NaN stays one.
inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// For |x| <= 127, rounded to the nearest: adding 1.5 * 2^23 leaves the integer in the low bits.
inline int8_t to_int8(float x) {
    const float shifted = x + 12582912.0f;
    uint8_t low;
    __builtin_memcpy(&low, &shifted, 1);
    return static_cast<int8_t>(low);
}

// The largest magnitude of a row; NaN where the row has one.
inline float largest_magnitude(const float* row, int64_t n) {
    Vec top = splat(0.0f), poison = splat(0.0f);
    for (int64_t i = 0; i < n; i += kWidth) {
        const Vec x = n - i < kWidth ? load_some(row + i, n - i) : load(row + i);
        top = larger(top, magnitude_of(x));
        poison += x * 0.0f;  // NaN for what is not finite
    }
    float largest = 0, sum = 0;
    for (int i = 0; i < kWidth; ++i) {
        largest = largest < top[i] ? top[i] : largest;
        sum += poison[i];
    }
    return largest + sum;
}

// One lane of one part of a page: head_dim elements, `stride` apart, of which element 0 is `first`.
inline void lay_down(CacheType type, const float* row, int64_t n, int64_t first, int64_t stride, int64_t lane,
                     std::byte* part) {
    switch (type) {
        case CacheType::float32: {
            float* to = reinterpret_cast<float*>(part) + first;
            for (int64_t d = 0; d < n; ++d) to[d * stride] = row[d];
            return;
        }
        case CacheType::bfloat16: {
            uint16_t* to = reinterpret_cast<uint16_t*>(part) + first;
            for (int64_t d = 0; d < n; ++d) to[d * stride] = to_bfloat16(row[d]);
            return;
        }
        case CacheType::int8: {
            int8_t* to = reinterpret_cast<int8_t*>(part) + first;
            const float largest = largest_magnitude(row, n);
            const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
            for (int64_t d = 0; d < n; ++d) to[d * stride] = to_int8(row[d] * inverse);
            reinterpret_cast<float*>(part + element_bytes(type, n))[lane] = largest / 127.0f;
            return;
        }
    }
}

void append_key(CacheType type, const float* row, int64_t head_dim, int64_t lane, std::byte* keys) {
    lay_down(type, row, head_dim, lane, kPage, lane, keys);
}

void append_value(CacheType type, const float* row, int64_t head_dim, int64_t lane, std::byte* values) {
    lay_down(type, row, head_dim, lane * page_width(head_dim), 1, lane, values);
}

void rotate(const float* row, int64_t head_dim, const RowRotation& rotation, float* out) {
    const int64_t half = rotation.rotated / 2;
    if (row != out)
        for (int64_t d = 2 * half; d < head_dim; ++d) out[d] = row[d];
    if (!rotation.interleaved)
        return rotate_pairs(row, row + half, rotation.cos, rotation.sin, 1.0f, half, out, out + half);
    float first[kMaxHeadDim / 2], second[kMaxHeadDim / 2];
    for (int64_t i = 0; i < half; ++i) {
        first[i] = row[2 * i];
        second[i] = row[2 * i + 1];
    }
    rotate_pairs(first, second, rotation.cos, rotation.sin, 1.0f, half, first, second);
    for (int64_t i = 0; i < half; ++i) {
        out[2 * i] = first[i];
        out[2 * i + 1] = second[i];
    }
}

}  // namespace
}  // namespace tandem
