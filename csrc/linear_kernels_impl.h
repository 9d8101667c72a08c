// The body of linear_kernels.h, compiled once a CPU path with that path's compiler flags.
#pragma once

#include "linear_epilogue_impl.h"
#include "linear_float_impl.h"
#include "linear_integer_impl.h"

#if defined(__AMX_INT8__)
#include "linear_amx_impl.h"
#endif

namespace tandem {
namespace {

constexpr int64_t kSumRows = 48;  // rows whose sums are held at a time

// How many steps of fetching a tile has, over all its passes through the chunk.
constexpr int64_t kPasses = kChunk / (kFloatVecs * kWidth);

// Calls body(row, size, tile, tiles). Rows are shared out evenly: 8 are 4 and 4, for a small tile has too few
// chains to hide the latency.
template <class Body>
inline void for_row_tiles(int64_t first_row, int64_t rows, int64_t at_once, Body body) {
    const int64_t tiles = (rows + at_once - 1) / at_once;
    for (int64_t done = 0, tile = 0; tile < tiles; ++tile) {
        const int64_t left = tiles - tile, size = (rows - done + left - 1) / left;
        body(first_row + done, size, tile, tiles);
        done += size;
    }
}

inline void finish_rows(const LinearBatch& batch, float* sums, int64_t row, int64_t rows, int64_t chunk) {
    for (int64_t i = 0; i < rows; ++i)
        finish_row(batch.epilogue, sums + i * kChunk, row + i, chunk, batch.weight->outputs);
}

// A few rows go through the chunk in one pass, as fast as memory gives it.
template <class Weights>
void few_rows_chunk(const LinearBatch& batch, int64_t row, int64_t rows, int64_t chunk, Upcoming upcoming) {
    const PackedMatrix& w = *batch.weight;
    const auto* weights = reinterpret_cast<const typename Weights::Number*>(w.chunk(chunk));
    alignas(64) float sums[kFloatRows * kChunk];
    const FloatRows x = {batch.x.data + row * batch.x.stride, batch.x.stride};
    Prefetcher ahead(upcoming, 0, 1, kPasses * w.inputs / kFloatStep + 1);
    float_product<Weights, false>(x, rows, weights, w.inputs, ahead, sums);
    finish_rows(batch, sums, row, rows, chunk);
}

// More rows share each block of a chunk's inputs while it is in the first-level cache, which the next block
// enters meanwhile: read again from the second level, it would keep the fetching from memory waiting. Source
// gives the blocks: how many inputs they have, where their bytes are, and what they are as floats.
template <class Source>
void blocked_chunk(const LinearBatch& batch, const Source& source, int64_t first_row, int64_t rows,
                   int64_t chunk, Upcoming upcoming) {
    const PackedMatrix& w = *batch.weight;
    for_row_tiles(first_row, rows, kSumRows, [&](int64_t first, int64_t count, int64_t part, int64_t parts) {
        alignas(64) float sums[kSumRows * kChunk];
        alignas(64) float wide[Source::kInputs * kChunk];
        __builtin_memset(sums, 0, static_cast<unsigned long>(count * kChunk) * sizeof(float));
        for (int64_t k = 0; k < w.inputs; k += Source::kInputs) {
            const int64_t depth = k + Source::kInputs <= w.inputs ? Source::kInputs : w.inputs - k;
            const float* weights = source.floats(w, chunk, k, depth, wide);
            Upcoming next = {source.bytes(w, chunk, k + depth), source.size(w)};
            if (k + depth == w.inputs) next = {part + 1 < parts ? w.chunk(chunk) : upcoming.data, next.size};
            for_row_tiles(0, count, kFloatRows, [&](int64_t row, int64_t size, int64_t tile, int64_t tiles) {
                const FloatRows x = {batch.x.data + (first + row) * batch.x.stride + k, batch.x.stride};
                Prefetcher ahead(next, tile, tiles, kPasses * Source::kInputs / kFloatStep);
                float_product<Float32Weights, true>(x, size, weights, depth, ahead, sums + row * kChunk);
            });
        }
        finish_rows(batch, sums, first, count, chunk);
    });
}

template <class Weights>
struct FloatBlocks {
    using Number = typename Weights::Number;
    static constexpr int64_t kInputs = 64;
    static int64_t size(const PackedMatrix&) {
        return kInputs * kChunk * static_cast<int64_t>(sizeof(Number));
    }
    static const uint8_t* bytes(const PackedMatrix& w, int64_t chunk, int64_t k) {
        return w.chunk(chunk) + k * kChunk * static_cast<int64_t>(sizeof(Number));
    }
    static const float* floats(const PackedMatrix& w, int64_t chunk, int64_t k, int64_t depth, float* wide) {
        const auto* numbers = reinterpret_cast<const Number*>(bytes(w, chunk, k));
        if constexpr (sizeof(Number) == sizeof(float)) return reinterpret_cast<const float*>(numbers);
        for (int64_t i = 0; i < depth * kChunk; i += kWidth) store(wide + i, Weights::load_vec(numbers + i));
        return wide;
    }
};

// Four-bit weights for rows that are not rounded.
struct NibbleBlocks {
    static constexpr int64_t kInputs = kDepthUnit;
    static int64_t size(const PackedMatrix& w) { return kInputs / w.group * w.group_bytes(); }
    static const uint8_t* bytes(const PackedMatrix& w, int64_t chunk, int64_t k) {
        return w.chunk(chunk) + k / w.group * w.group_bytes();
    }
    static const float* floats(const PackedMatrix& w, int64_t chunk, int64_t k, int64_t depth, float* wide) {
        for (int64_t i = 0; i < depth; i += w.group)
            widen_group(w, bytes(w, chunk, k + i), wide + i * kChunk);
        return wide;
    }
};

template <class Weights>
void float_chunk(const LinearBatch& batch, int64_t first_row, int64_t rows, int64_t chunk,
                 Upcoming upcoming) {
    if (rows <= kFloatRows) return few_rows_chunk<Weights>(batch, first_row, rows, chunk, upcoming);
    blocked_chunk(batch, FloatBlocks<Weights>{}, first_row, rows, chunk, upcoming);
}

// What differs between eight and four bits: the rows of a tile, the tiles of a few or of many rows, the
// outliers.
struct Int8Chunk {
    static constexpr int kRows = kByteRowsAtOnce;
    template <int kSize>
    static constexpr auto kTile = int8_rows<kSize>;
    static constexpr auto kAddOutliers = add_int8_outliers;
#if defined(__AMX_INT8__)
    static constexpr auto kTiles = int8_tiles;
#endif
};

struct Int4Chunk {
    static constexpr int kRows = kNibbleRows;
    template <int kSize>
    static constexpr auto kTile = int4_rows<kSize>;
    static constexpr auto kAddOutliers = add_int4_outliers;
#if defined(__AMX_INT8__)
    static constexpr auto kTiles = int4_tiles;
#endif
};

// The tile of `size` rows, kSize at most.
template <class Kind, int kSize>
inline void integer_tile(int64_t size, const PackedMatrix& w, const ByteRows& x, int64_t row, int64_t chunk,
                         Prefetcher& ahead, float* sums) {
    if constexpr (kSize > 1)
        if (size < kSize) return integer_tile<Kind, kSize - 1>(size, w, x, row, chunk, ahead, sums);
    Kind::template kTile<kSize>(w, x, row, chunk, ahead, sums);
}

template <class Kind>
void integer_chunk(const LinearBatch& batch, int64_t first_row, int64_t rows, int64_t chunk,
                   Upcoming upcoming) {
    const PackedMatrix& w = *batch.weight;
    const auto finish = [&](float* sums, int64_t row, int64_t size) {
        for (int64_t i = 0; i < size; ++i)
            Kind::kAddOutliers(w, batch.bytes.outliers + (row + i) * kOutliers, chunk, sums + i * kChunk);
        finish_rows(batch, sums, row, size, chunk);
    };
#if defined(__AMX_INT8__)
    if (rows >= kTileRowsFrom) {
        const TileSession session;
        const auto some = [&](int64_t row, int64_t size, int64_t tile, int64_t tiles) {
            alignas(64) float sums[kRowUnit * kChunk];
            Prefetcher ahead(upcoming, tile, tiles, tile_steps(w, size));
            Kind::kTiles(w, batch.bytes, row, size, chunk, ahead, sums);
            finish(sums, row, size);
        };
        return for_row_tiles_of(kRowUnit, first_row, rows, some);
    }
#endif
    for_row_tiles(first_row, rows, Kind::kRows, [&](int64_t row, int64_t size, int64_t tile, int64_t tiles) {
        alignas(64) float sums[Kind::kRows * kChunk];
        Prefetcher ahead(upcoming, tile, tiles, byte_steps(w));
        integer_tile<Kind, Kind::kRows>(size, w, batch.bytes, row, chunk, ahead, sums);
        finish(sums, row, size);
    });
}

void product(const LinearBatch& batch, int64_t first_row, int64_t rows, int64_t chunk, Upcoming upcoming) {
    switch (batch.weight->storage) {
        case Storage::float32:
            return float_chunk<Float32Weights>(batch, first_row, rows, chunk, upcoming);
        case Storage::bfloat16:
            return float_chunk<BFloat16Weights>(batch, first_row, rows, chunk, upcoming);
        case Storage::float16:
            return float_chunk<Float16Weights>(batch, first_row, rows, chunk, upcoming);
        case Storage::int8:
            return integer_chunk<Int8Chunk>(batch, first_row, rows, chunk, upcoming);
        case Storage::int4:
            return batch.x.data != nullptr
                       ? blocked_chunk(batch, NibbleBlocks{}, first_row, rows, chunk, upcoming)
                       : integer_chunk<Int4Chunk>(batch, first_row, rows, chunk, upcoming);
    }
}

constexpr LinearKernels kLinearKernels = {product, quantize};

}  // namespace
}  // namespace tandem
