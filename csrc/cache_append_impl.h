// A token's way into the cache: rotated, converted, and laid down in its page. Compiled once a CPU path.
#pragma once

#include "cached_attention_kernels.h"
#include "cached_products_impl.h"
#include "rotation_impl.h"

namespace tandem {
namespace {

inline Vec magnitude_of(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<Bits>(x) & 0x7fffffffu); }

inline uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

// A row's elements as the cache holds them, times factor (int8 only).
inline void convert(const float* row, int64_t n, float, float* to) {
    for (int64_t d = 0; d < n; ++d) to[d] = row[d];
}

// Rounded to the nearest, ties to even; NaN stays one.
inline void convert(const float* row, int64_t n, float, uint16_t* to) {
    for (int64_t d = 0; d < n; ++d) {
        const uint32_t bits = bits_of(row[d]), rounded = bits + 0x7fff + (bits >> 16 & 1);
        to[d] = static_cast<uint16_t>((row[d] != row[d] ? bits | 0x400000 : rounded) >> 16);
    }
}

// Rounded to the nearest, for products up to 127: adding 1.5 * 2^23 leaves the integer in the low bits.
inline void convert(const float* row, int64_t n, float factor, int8_t* to) {
    for (int64_t d = 0; d < n; ++d)
        to[d] = static_cast<int8_t>(static_cast<uint8_t>(bits_of(row[d] * factor + 12582912.0f)));
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

// Elements `first`, first + stride, ... of a part, and the token's scale behind them.
template <class T>
inline void lay_down_as(const float* row, int64_t n, int64_t first, int64_t stride, int64_t lane,
                        std::byte* part) {
    float factor = 1;
    if constexpr (sizeof(T) == 1) {
        const float largest = largest_magnitude(row, n);
        factor = largest > 0 ? 127.0f / largest : 0.0f;
        reinterpret_cast<float*>(part + element_bytes(CacheType::int8, n))[lane] = largest / 127.0f;
    }
    T* to = reinterpret_cast<T*>(part) + first;
    if (stride == 1) return convert(row, n, factor, to);
    T converted[kMaxHeadDim];
    convert(row, n, factor, converted);
    for (int64_t d = 0; d < n; ++d) to[d * stride] = converted[d];
}

inline void lay_down(CacheType type, const float* row, int64_t n, int64_t first, int64_t stride, int64_t lane,
                     std::byte* part) {
    switch (type) {
        case CacheType::float32:
            return lay_down_as<float>(row, n, first, stride, lane, part);
        case CacheType::bfloat16:
            return lay_down_as<uint16_t>(row, n, first, stride, lane, part);
        case CacheType::int8:
            return lay_down_as<int8_t>(row, n, first, stride, lane, part);
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
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t n = at_most(kLanes, half - i);
        float first[kLanes] = {}, second[kLanes] = {};
        for (int64_t j = 0; j < n; ++j) {
            first[j] = row[2 * (i + j)];
            second[j] = row[2 * (i + j) + 1];
        }
        rotate_pairs(first, second, rotation.cos + i, rotation.sin + i, 1.0f, n, first, second);
        for (int64_t j = 0; j < n; ++j) {
            out[2 * (i + j)] = first[j];
            out[2 * (i + j) + 1] = second[j];
        }
    }
}

}  // namespace
}  // namespace tandem
