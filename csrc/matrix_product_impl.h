// Small matrix products whose operands sit in the first-level cache, compiled once a CPU path.
//
// A tile of C, as large as the registers hold, is kept in them while the depth runs: each step broadcasts one
// number a row of A and multiplies it into vectors of B. An element of C is one chain of fused multiply-adds
// in order of depth, whatever the tile, so cutting a product anywhere leaves its bits alone.
#pragma once

#include "simd.h"

namespace tandem {
namespace {

// C's accumulators, one row of B and one number of A: 27 of 32 registers, or 15 of 16.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVecs = 2;

inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// A row-major matrix, `stride` floats from row to row.
struct Matrix {
    const float* data;
    int64_t stride;
};

struct Result {
    float* data;
    int64_t stride;
    bool add;  // to what is there
};

// C (rows, vecs * kWidth) = A B, or C += A B where kAdd; A is read transposed, (depth, rows), where
// kTransposed. All are template parameters, for a choice at run time would send the sums through memory.
template <int kRows, int kVecs, bool kTransposed, bool kAdd>
void tile(Matrix a, Matrix b, Result c, int64_t depth) {
    Vec sums[kRows][kVecs];
    for (int i = 0; i < kRows; ++i)
        for (int n = 0; n < kVecs; ++n)
            sums[i][n] = kAdd ? load(c.data + i * c.stride + n * kWidth) : splat(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[kVecs];
        for (int n = 0; n < kVecs; ++n) row[n] = load(b.data + k * b.stride + n * kWidth);
        for (int i = 0; i < kRows; ++i) {
            const Vec x = splat(kTransposed ? a.data[k * a.stride + i] : a.data[i * a.stride + k]);
            for (int n = 0; n < kVecs; ++n) sums[i][n] = multiply_add(x, row[n], sums[i][n]);
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int n = 0; n < kVecs; ++n) store(c.data + i * c.stride + n * kWidth, sums[i][n]);
}

using Tile = void (*)(Matrix, Matrix, Result, int64_t);

template <int kVecs, bool kTransposed, bool kAdd>
constexpr Tile kTiles[] = {
    nullptr,
    tile<1, kVecs, kTransposed, kAdd>,
    tile<2, kVecs, kTransposed, kAdd>,
    tile<3, kVecs, kTransposed, kAdd>,
    tile<4, kVecs, kTransposed, kAdd>,
    tile<5, kVecs, kTransposed, kAdd>,
    tile<6, kVecs, kTransposed, kAdd>,
#if defined(__AVX512F__)
    tile<7, kVecs, kTransposed, kAdd>,
    tile<8, kVecs, kTransposed, kAdd>,
    tile<9, kVecs, kTransposed, kAdd>,
    tile<10, kVecs, kTransposed, kAdd>,
    tile<11, kVecs, kTransposed, kAdd>,
    tile<12, kVecs, kTransposed, kAdd>,
#endif
};

// Rows are shared out evenly: 32 are 11, 11 and 10, for a small tile has too few chains to hide the latency.
template <int kVecs, bool kTransposed>
inline void column_of_tiles(Matrix a, Matrix b, Result c, int64_t rows, int64_t depth) {
    int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t done = 0; tiles > 0; --tiles) {
        const int64_t size = (rows - done + tiles - 1) / tiles;
        const Matrix part = {a.data + done * (kTransposed ? 1 : a.stride), a.stride};
        const Tile run =
            c.add ? kTiles<kVecs, kTransposed, true>[size] : kTiles<kVecs, kTransposed, false>[size];
        run(part, b, {c.data + done * c.stride, c.stride, c.add}, depth);
        done += size;
    }
}

// C (rows, columns) = A B, or C += A B; columns must be a multiple of kWidth.
template <bool kTransposed>
void product(Matrix a, Matrix b, Result c, int64_t rows, int64_t columns, int64_t depth) {
    int64_t n = 0;
    for (; n + kTileVecs * kWidth <= columns; n += kTileVecs * kWidth)
        column_of_tiles<kTileVecs, kTransposed>(a, {b.data + n, b.stride}, {c.data + n, c.stride, c.add},
                                                rows, depth);
    if (n < columns)
        column_of_tiles<1, kTransposed>(a, {b.data + n, b.stride}, {c.data + n, c.stride, c.add}, rows,
                                        depth);
}

}  // namespace
}  // namespace tandem
