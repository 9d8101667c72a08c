// The integer products on AMX's tiles: sixteen rows of sixty-four bytes each, from rows of x and from the
// chunk as it is packed. The sums are the same integers as without.
#pragma once

#include "linear_integer_impl.h"

namespace tandem {
namespace {

constexpr int64_t kTileRowsFrom = 4;  // with fewer rows the vectors' products keep up with memory
constexpr int64_t kTileSide = 16;
constexpr int64_t kTileBytes = 64;

// The compiler does not see that the instructions for tiles read memory (GCC 12 declares a few bytes of it,
// or none): what has been written must be there before them.
inline void settle_memory(const void* written) { asm volatile("" ::"r"(written) : "memory"); }

// All tiles whole, for as long as it lives.
class TileSession {
  public:
    TileSession() {
        Config config;
        for (int i = 0; i < 8; ++i) {
            config.bytes_per_row[i] = kTileBytes;
            config.rows[i] = kTileSide;
        }
        settle_memory(&config);
        _tile_loadconfig(&config);
    }
    ~TileSession() { _tile_release(); }
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;

  private:
    struct Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes_per_row[16] = {};
        uint8_t rows[16] = {};
    };
};

template <class Body>
inline void for_row_tiles_of(int64_t unit, int64_t first_row, int64_t rows, Body body) {
    const int64_t tiles = (rows + unit - 1) / unit;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t done = tile * unit;
        body(first_row + done, rows - done < unit ? rows - done : unit, tile, tiles);
    }
}

// Steps of fetching that `rows` rows take: thirty-two go through the chunk twice.
inline int64_t tile_steps(const PackedMatrix& w, int64_t rows) {
    const int64_t unit = w.storage == Storage::int4 && w.group < kTileBytes ? w.group : kTileBytes;
    return w.depth() / unit * (rows <= kTileSide ? 1 : 2);
}

// integers (kTileSide, kChunk): sixteen rows of x with a whole chunk.
inline void multiply_sixteen(const int8_t* x, int64_t stride, const uint8_t* weights, int64_t depth,
                             Prefetcher& ahead, int32_t* integers) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kTileBytes, weights += kTileBytes * kChunk) {
        ahead.step();
        _tile_loadd(4, x + k, stride);
        _tile_loadd(5, weights, 4 * kChunk);
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(6, weights + kTileBytes, 4 * kChunk);
        _tile_dpbsud(1, 4, 6);
        _tile_loadd(7, weights + 2 * kTileBytes, 4 * kChunk);
        _tile_dpbsud(2, 4, 7);
        _tile_loadd(5, weights + 3 * kTileBytes, 4 * kChunk);
        _tile_dpbsud(3, 4, 5);
    }
    _tile_stored(0, integers, 4 * kChunk);
    _tile_stored(1, integers + kTileSide, 4 * kChunk);
    _tile_stored(2, integers + 2 * kTileSide, 4 * kChunk);
    _tile_stored(3, integers + 3 * kTileSide, 4 * kChunk);
}

// integers (2 * kTileSide, kChunk): thirty-two rows, with half a chunk at a time.
inline void multiply_thirty_two(const int8_t* x, int64_t stride, const uint8_t* weights, int64_t depth,
                                Prefetcher& ahead, int32_t* integers) {
    for (int half = 0; half < 2; ++half, integers += 2 * kTileSide) {
        const uint8_t* w = weights + half * 2 * kTileBytes;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < depth; k += kTileBytes, w += kTileBytes * kChunk) {
            ahead.step();
            _tile_loadd(4, x + k, stride);
            _tile_loadd(5, x + kTileSide * stride + k, stride);
            _tile_loadd(6, w, 4 * kChunk);
            _tile_loadd(7, w + kTileBytes, 4 * kChunk);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(0, integers, 4 * kChunk);
        _tile_stored(1, integers + kTileSide, 4 * kChunk);
        _tile_stored(2, integers + kTileSide * kChunk, 4 * kChunk);
        _tile_stored(3, integers + kTileSide * kChunk + kTileSide, 4 * kChunk);
    }
}

inline void multiply(const int8_t* x, int64_t stride, int64_t rows, const uint8_t* weights, int64_t depth,
                     Prefetcher& ahead, int32_t* integers) {
    settle_memory(weights);
    if (rows <= kTileSide)
        multiply_sixteen(x, stride, weights, depth, ahead, integers);
    else
        multiply_thirty_two(x, stride, weights, depth, ahead, integers);
}

// Sums (rows, kChunk) of kRowUnit rows at most; the rows of x after them are read too.
inline void int8_tiles(const PackedMatrix& w, const ByteRows& x, int64_t row, int64_t rows, int64_t chunk,
                       Prefetcher& ahead, float* sums) {
    alignas(64) int32_t integers[kRowUnit * kChunk];
    multiply(x.data + row * x.stride, x.stride, rows, w.chunk(chunk), w.depth(), ahead, integers);
    const float* scales = w.scales + chunk * kChunk;
    for (int64_t i = 0; i < rows; ++i) {
        const Ints offset = splat_ints(-kByteOffset * x.sums[row + i]);
        for (int64_t n = 0; n < kChunk; n += kWidth)
            store(sums + i * kChunk + n, to_floats(load_ints(integers + i * kChunk + n) + offset) *
                                             (load(scales + n) * x.scales[row + i]));
    }
}

// A group's values as the bytes of an int8 chunk, zeros after them up to a whole tile.
inline void unpack_nibbles(const PackedMatrix& w, const uint8_t* begin, uint8_t* bytes) {
    for (int64_t k = 0; k < w.group; k += 8, bytes += 8 * kChunk)
        for (int64_t n = 0; n < kChunk * 4; n += kWidth * 4) {
            const Ints both = load_ints(begin + k / 2 * kChunk + n);
            const Ints low = both & 0x0f0f0f0f;
            const Ints high = reinterpret_cast<Ints>(reinterpret_cast<Bits>(both) >> 4) & 0x0f0f0f0f;
            __builtin_memcpy(bytes + n, &low, sizeof low);
            __builtin_memcpy(bytes + 4 * kChunk + n, &high, sizeof high);
        }
}

inline void add_scaled_group(const PackedMatrix& w, const uint8_t* scales, const int32_t* integers,
                             const int32_t* sums, int64_t groups, int64_t rows, float* totals) {
    for (int64_t n = 0; n < kChunk; n += kWidth) {
        const Vec scale = load_half_vec(scales + n * 2);
        const Vec minimum = w.symmetric ? splat(0.0f) : load_half_vec(scales + (kChunk + n) * 2);
        for (int64_t i = 0; i < rows; ++i) {
            const int32_t sum = sums[i * groups];
            const Ints offset = splat_ints(w.symmetric ? -8 * sum : 0);
            float* total = totals + i * kChunk + n;
            Vec v =
                multiply_add(to_floats(load_ints(integers + i * kChunk + n) + offset), scale, load(total));
            if (!w.symmetric) v = multiply_add(minimum, splat(static_cast<float>(sum)), v);
            store(total, v);
        }
    }
}

// As int8_tiles for four bits. A group of 32 fills half a tile; zeros fill the rest.
inline void int4_tiles(const PackedMatrix& w, const ByteRows& x, int64_t row, int64_t rows, int64_t chunk,
                       Prefetcher& ahead, float* sums) {
    alignas(64) uint8_t bytes[kDepthUnit * kChunk] = {};
    alignas(64) int32_t integers[kRowUnit * kChunk];
    for (int64_t i = 0; i < rows * kChunk; ++i) sums[i] = 0.0f;
    const uint8_t* begin = w.chunk(chunk);
    for (int64_t g = 0; g < x.groups; ++g, begin += w.group_bytes()) {
        unpack_nibbles(w, begin, bytes);
        multiply(x.data + row * x.stride + g * w.group, x.stride, rows, bytes, w.group, ahead, integers);
        add_scaled_group(w, begin + kChunk * w.group / 2, integers, x.sums + row * x.groups + g, x.groups,
                         rows, sums);
    }
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t n = 0; n < kChunk; n += kWidth)
            store(sums + i * kChunk + n, load(sums + i * kChunk + n) * x.scales[row + i]);
}

}  // namespace
}  // namespace tandem
