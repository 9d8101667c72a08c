// Small matrix products whose operands sit in the first-level cache, compiled once a CPU path.
//
// A tile of C, as large as the registers hold, is kept in them while the depth runs: each step broadcasts one
// number a row of A and multiplies it into vectors of B. An element of C is one chain of fused multiply-adds
// in order of depth, whatever the tile, so its bits do not depend on the size of the product.
#pragma once

#include "simd_math.h"

namespace tandem {
namespace {

// C's accumulators, one row of B and one number of A: 27 of 32 registers, or 15 of 16.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVecs = 2;

// A row-major matrix, `stride` floats from row to row.
struct Matrix {
    const float* data;
    int64_t stride;
};

// What becomes of C: replaced; its sums continued, as if the product had not been cut; or the product's own
// sums added to it, which rounds less where many products meet.
enum class Into { replace, extend, add };

struct Result {
    float* data;
    int64_t stride;
    Into into;
};

// A B into C (rows, vecs * kWidth); A is read transposed, (depth, rows), where kTransposed. All are template
// parameters, for a choice at run time would send the sums through memory.
template <int kRows, int kVecs, bool kTransposed, Into kInto>
void tile(Matrix a, Matrix b, Result c, int64_t depth) {
    Vec sums[kRows][kVecs];
    for (int i = 0; i < kRows; ++i)
        for (int n = 0; n < kVecs; ++n)
            sums[i][n] = kInto == Into::extend ? load(c.data + i * c.stride + n * kWidth) : splat(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[kVecs];
        for (int n = 0; n < kVecs; ++n) row[n] = load(b.data + k * b.stride + n * kWidth);
        for (int i = 0; i < kRows; ++i) {
            const Vec x = splat(kTransposed ? a.data[k * a.stride + i] : a.data[i * a.stride + k]);
            for (int n = 0; n < kVecs; ++n) sums[i][n] = multiply_add(x, row[n], sums[i][n]);
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int n = 0; n < kVecs; ++n) {
            float* place = c.data + i * c.stride + n * kWidth;
            store(place, kInto == Into::add ? load(place) + sums[i][n] : sums[i][n]);
        }
}

using Tile = void (*)(Matrix, Matrix, Result, int64_t);

template <int kVecs, bool kTransposed, Into kInto>
constexpr Tile kTiles[] = {
    nullptr,
    tile<1, kVecs, kTransposed, kInto>,
    tile<2, kVecs, kTransposed, kInto>,
    tile<3, kVecs, kTransposed, kInto>,
    tile<4, kVecs, kTransposed, kInto>,
    tile<5, kVecs, kTransposed, kInto>,
    tile<6, kVecs, kTransposed, kInto>,
#if defined(__AVX512F__)
    tile<7, kVecs, kTransposed, kInto>,
    tile<8, kVecs, kTransposed, kInto>,
    tile<9, kVecs, kTransposed, kInto>,
    tile<10, kVecs, kTransposed, kInto>,
    tile<11, kVecs, kTransposed, kInto>,
    tile<12, kVecs, kTransposed, kInto>,
#endif
};

// Rows are shared out evenly: 32 are 11, 11 and 10, for a small tile has too few chains to hide the latency.
template <int kVecs, bool kTransposed, Into kInto>
inline void column_of_tiles(Matrix a, Matrix b, Result c, int64_t rows, int64_t depth) {
    int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t done = 0; tiles > 0; --tiles) {
        const int64_t size = (rows - done + tiles - 1) / tiles;
        const Matrix part = {a.data + done * (kTransposed ? 1 : a.stride), a.stride};
        kTiles<kVecs, kTransposed, kInto>[size](part, b, {c.data + done * c.stride, c.stride, kInto}, depth);
        done += size;
    }
}

template <bool kTransposed, Into kInto>
void product_into(Matrix a, Matrix b, Result c, int64_t rows, int64_t columns, int64_t depth) {
    int64_t n = 0;
    for (; n + kTileVecs * kWidth <= columns; n += kTileVecs * kWidth)
        column_of_tiles<kTileVecs, kTransposed, kInto>(a, {b.data + n, b.stride},
                                                       {c.data + n, c.stride, kInto}, rows, depth);
    if (n < columns)
        column_of_tiles<1, kTransposed, kInto>(a, {b.data + n, b.stride}, {c.data + n, c.stride, kInto}, rows,
                                               depth);
}

// A B into C (rows, columns); columns must be a multiple of kWidth.
template <bool kTransposed>
inline void product(Matrix a, Matrix b, Result c, int64_t rows, int64_t columns, int64_t depth) {
    switch (c.into) {
        case Into::replace:
            return product_into<kTransposed, Into::replace>(a, b, c, rows, columns, depth);
        case Into::extend:
            return product_into<kTransposed, Into::extend>(a, b, c, rows, columns, depth);
        case Into::add:
            return product_into<kTransposed, Into::add>(a, b, c, rows, columns, depth);
    }
}

}  // namespace
}  // namespace tandem
