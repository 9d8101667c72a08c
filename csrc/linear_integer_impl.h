// Products of rows of bytes with a chunk of weights in eight or four bits. Sums are exact integers, over all
// inputs or over a group of them, before they are scaled.
#pragma once

#include "bytes_impl.h"
#include "prefetch_impl.h"

namespace tandem {
namespace {

#if defined(__AVX512F__)
constexpr int kByteRowsAtOnce = 6;
constexpr int kByteVecs = 4;
constexpr int kNibbleRows = 3;
#else
constexpr int kByteRowsAtOnce = 4;
constexpr int kByteVecs = 2;
constexpr int kNibbleRows = 2;
#endif

constexpr int64_t kByteStep = 32;  // inputs between two looks at what is to be fetched

// How many such steps a tile takes, over all its passes through the chunk.
inline int64_t byte_steps(const PackedMatrix& w) {
    return w.depth() / kByteStep * (kChunk / (kByteVecs * kWidth));
}

// Sums (kRows, kChunk) of rows `row` on with kVecs vectors of an int8 chunk, of which `first` is the first
// output.
template <int kRows, int kVecs>
void int8_tile(const PackedMatrix& w, const ByteRows& x, int64_t row, int64_t chunk, int64_t first,
               Prefetcher& ahead, float* sums) {
    const uint8_t* weights = w.chunk(chunk) + first * 4;
    const int8_t* bytes = x.data + row * x.stride;
    Ints totals[kRows][kVecs];
    for (int i = 0; i < kRows; ++i)
        for (int n = 0; n < kVecs; ++n) totals[i][n] = splat_ints(-kByteOffset * x.sums[row + i]);
    for (int64_t k = 0; k < w.depth(); k += 4) {
        if (k % kByteStep == 0) ahead.step();
        Ints four[kVecs];
        for (int n = 0; n < kVecs; ++n) four[n] = load_ints(weights + k * kChunk + n * kWidth * 4);
        for (int i = 0; i < kRows; ++i) {
            const Ints number = splat_bytes(bytes + i * x.stride + k);
            for (int n = 0; n < kVecs; ++n) totals[i][n] = dot_add(totals[i][n], four[n], number);
        }
    }
    const float* scales = w.scales + chunk * kChunk + first;
    for (int i = 0; i < kRows; ++i)
        for (int n = 0; n < kVecs; ++n)
            store(sums + i * kChunk + first + n * kWidth,
                  to_floats(totals[i][n]) * (load(scales + n * kWidth) * x.scales[row + i]));
}

template <int kRows>
void int8_rows(const PackedMatrix& w, const ByteRows& x, int64_t row, int64_t chunk, Prefetcher& ahead,
               float* sums) {
    constexpr int kVecs = kRows == 1 ? kLoneVecs : kByteVecs;
    for (int64_t first = 0; first < kChunk; first += kVecs * kWidth)
        int8_tile<kRows, kVecs>(w, x, row, chunk, first, ahead, sums);
}

inline Vec load_half_vec(const uint8_t* p) {
    return from_half(load_halves(reinterpret_cast<const uint16_t*>(p)));
}

// As int8_tile for four bits: each group's integers are scaled and added up as floats.
template <int kRows, int kVecs>
void int4_tile(const PackedMatrix& w, const ByteRows& x, int64_t row, int64_t chunk, int64_t first,
               Prefetcher& ahead, float* sums) {
    const int8_t* bytes = x.data + row * x.stride;
    const uint8_t* begin = w.chunk(chunk);
    Vec totals[kRows][kVecs];
    for (int i = 0; i < kRows; ++i)
        for (int n = 0; n < kVecs; ++n) totals[i][n] = splat(0.0f);
    for (int64_t g = 0; g < x.groups; ++g, begin += w.group_bytes(), bytes += w.group) {
        const int32_t* group_sums = x.sums + row * x.groups + g;
        Ints integers[kRows][kVecs];
        for (int i = 0; i < kRows; ++i)
            for (int n = 0; n < kVecs; ++n)
                integers[i][n] = splat_ints(w.symmetric ? -8 * group_sums[i * x.groups] : 0);
        for (int64_t step = 0; step < w.group; step += kByteStep) ahead.step();
        for (int64_t k = 0; k < w.group; k += 8)
            for (int n = 0; n < kVecs; ++n) {
                const Ints both = load_ints(begin + k / 2 * kChunk + (first + n * kWidth) * 4);
                const Ints low = both & 0x0f0f0f0f;
                const Ints high = reinterpret_cast<Ints>(reinterpret_cast<Bits>(both) >> 4) & 0x0f0f0f0f;
                for (int i = 0; i < kRows; ++i) {
                    integers[i][n] = dot_add(integers[i][n], low, splat_bytes(bytes + i * x.stride + k));
                    integers[i][n] = dot_add(integers[i][n], high, splat_bytes(bytes + i * x.stride + k + 4));
                }
            }
        const uint8_t* scales = begin + kChunk * w.group / 2 + first * 2;
        for (int n = 0; n < kVecs; ++n) {
            const Vec scale = load_half_vec(scales + n * kWidth * 2);
            for (int i = 0; i < kRows; ++i)
                totals[i][n] = multiply_add(to_floats(integers[i][n]), scale, totals[i][n]);
            if (w.symmetric) continue;
            const Vec minimum = load_half_vec(scales + kChunk * 2 + n * kWidth * 2);
            for (int i = 0; i < kRows; ++i)
                totals[i][n] =
                    multiply_add(minimum, splat(static_cast<float>(group_sums[i * x.groups])), totals[i][n]);
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int n = 0; n < kVecs; ++n)
            store(sums + i * kChunk + first + n * kWidth, totals[i][n] * x.scales[row + i]);
}

template <int kRows>
void int4_rows(const PackedMatrix& w, const ByteRows& x, int64_t row, int64_t chunk, Prefetcher& ahead,
               float* sums) {
    constexpr int kVecs = kByteVecs;
    for (int64_t first = 0; first < kChunk; first += kVecs * kWidth)
        int4_tile<kRows, kVecs>(w, x, row, chunk, first, ahead, sums);
}

// A group's weights as floats, (group, kChunk), for rows that are not rounded.
inline void widen_group(const PackedMatrix& w, const uint8_t* begin, float* wide) {
    const uint8_t* scales = begin + kChunk * w.group / 2;
    for (int64_t n = 0; n < kChunk; n += kWidth) {
        const Vec scale = load_half_vec(scales + n * 2);
        const Vec minimum = w.symmetric ? scale * -8.0f : load_half_vec(scales + (kChunk + n) * 2);
        for (int64_t k = 0; k < w.group; k += 8) {
            const auto both = reinterpret_cast<Bits>(load_ints(begin + k / 2 * kChunk + n * 4));
            for (int half = 0; half < 2; ++half)
                for (int byte = 0; byte < 4; ++byte) {
                    const Bits value = both >> static_cast<uint32_t>(8 * byte + 4 * half) & 15u;
                    store(wide + (k + 4 * half + byte) * kChunk + n,
                          multiply_add(to_floats(reinterpret_cast<Ints>(value)), scale, minimum));
                }
        }
    }
}

// Adds a row's outliers times their weights to its sums (kChunk,).
inline void add_int8_outliers(const PackedMatrix& w, const Outlier* outliers, int64_t chunk, float* sums) {
    if (outliers[0].value == 0.0f) return;
    for (int64_t n = 0; n < kChunk; n += kWidth) {
        Vec products = splat(0.0f);
        for (int64_t o = 0; o < kOutliers; ++o) {
            const int64_t k = outliers[o].input;
            const auto four = reinterpret_cast<Bits>(load_ints(w.chunk(chunk) + (k / 4 * kChunk + n) * 4));
            const Bits byte = four >> static_cast<uint32_t>(8 * (k % 4)) & 255u;
            products = multiply_add(splat(outliers[o].value),
                                    to_floats(reinterpret_cast<Ints>(byte) - kByteOffset), products);
        }
        store(sums + n, multiply_add(products, load(w.scales + chunk * kChunk + n), load(sums + n)));
    }
}

inline void add_int4_outliers(const PackedMatrix& w, const Outlier* outliers, int64_t chunk, float* sums) {
    if (outliers[0].value == 0.0f) return;
    for (int64_t o = 0; o < kOutliers; ++o) {
        const int64_t within = outliers[o].input % w.group;
        const uint8_t* begin = w.chunk(chunk) + outliers[o].input / w.group * w.group_bytes();
        const uint8_t* scales = begin + kChunk * w.group / 2;
        const auto shift = static_cast<uint32_t>(8 * (within % 4) + within % 8 / 4 * 4);
        for (int64_t n = 0; n < kChunk; n += kWidth) {
            const auto both = reinterpret_cast<Bits>(load_ints(begin + (within / 8 * kChunk + n) * 4));
            const Vec value = to_floats(reinterpret_cast<Ints>(both >> shift & 15u)),
                      scale = load_half_vec(scales + n * 2);
            const Vec minimum = w.symmetric ? scale * -8.0f : load_half_vec(scales + (kChunk + n) * 2);
            store(sums + n, multiply_add(splat(outliers[o].value), multiply_add(value, scale, minimum),
                                         load(sums + n)));
        }
    }
}

}  // namespace
}  // namespace tandem
