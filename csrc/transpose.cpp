// Memory's work: what counts is that whole cache lines are read and written, so the SSE of every x86-64 does.
#include "transpose.h"

#include <algorithm>

#include "parallel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tandem {
namespace {

constexpr int64_t kTile = 16;    // floats of a cache line
constexpr int64_t kStripe = 64;  // columns of a task: four lines of a row, so that the prefetcher helps

void transpose_4x4(const float* from, int64_t stride, float* to, int64_t to_stride) {
#if defined(__SSE2__)
    __m128 row[4];
    for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_ps(from + i * stride);
    _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
    for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * to_stride, row[i]);
#else
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * stride + j];
#endif
}

// Four columns at a time, so that only four lines are being written: the rows of a wide matrix can share
// their place in the cache, which holds eight such lines.
void transpose_tile(const float* from, int64_t stride, float* to, int64_t to_stride) {
    for (int64_t j = 0; j < kTile; j += 4)
        for (int64_t i = 0; i < kTile; i += 4)
            transpose_4x4(from + i * stride + j, stride, to + j * to_stride + i, to_stride);
}

void transpose_block(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to,
                     int64_t to_stride) {
    for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = 0; i < rows; ++i) to[j * to_stride + i] = from[i * stride + j];
}

// Sixteen rows are added to each other first: a long sum rounds less in two steps.
void add_rows(const float* from, int64_t rows, int64_t columns, int64_t stride, float* sums) {
    float partial[kStripe] = {};
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) partial[j] += from[i * stride + j];
    for (int64_t j = 0; j < columns; ++j) sums[j] += partial[j];
}

void transpose_stripe(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to,
                      float* sums) {
    if (sums != nullptr) std::fill_n(sums, columns, 0.0f);
    const int64_t whole = columns - columns % kTile;
    for (int64_t i = 0; i < rows; i += kTile) {
        const float* top = from + i * stride;
        const int64_t count = std::min(kTile, rows - i);
        if (sums != nullptr) add_rows(top, count, columns, stride, sums);
        const int64_t tiled = count == kTile ? whole : 0;
        for (int64_t j = 0; j < tiled; j += kTile) transpose_tile(top + j, stride, to + j * rows + i, rows);
        transpose_block(top + tiled, count, columns - tiled, stride, to + tiled * rows + i, rows);
    }
}

}  // namespace

void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to, float* sums,
               int num_threads) {
    parallel_for((columns + kStripe - 1) / kStripe, num_threads, [&](int64_t stripe) {
        const int64_t first = stripe * kStripe;
        transpose_stripe(from + first, rows, std::min(kStripe, columns - first), stride, to + first * rows,
                         sums == nullptr ? nullptr : sums + first);
    });
}

}  // namespace tandem
