// Attention of some rows of a kv head over its cached keys, and the append to the cache: one implementation a
// CPU path.
//
// As in attention_kernels.h, row r of a head is query r / groups in query head r % groups of the group. Keys
// are cut into segments by their position alone. A segment gives each row a maximum score, a sum of
// exp(score - max) and a sum of values so weighted; segments are joined in order (the online softmax, Milakov
// and Gimelshein, arXiv:1805.02867).
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention_kernels.h"
#include "cache_pages.h"

namespace tandem {

constexpr int64_t kSegment = 512;     // keys
constexpr int64_t kMostTileRows = 8;  // rows that any path handles together

// Keys [begin, end); none where end is not above begin.
struct KeyRange {
    int64_t begin, end;
};

constexpr KeyRange common(KeyRange a, KeyRange b) {
    return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// One kv head of one sequence, and the queries that read it.
struct CachedHead {
    CacheLayer<const std::byte> cache;
    int64_t kv_head;
    const int32_t* blocks;
    int64_t groups, queries, keys;
    int64_t diagonal;       // query i stands at p = i + diagonal among the keys
    int64_t behind, ahead;  // and sees those from p - behind to p + ahead
    float softmax_scale;
    float softcap;  // 0: none
    DistanceBias bias;
    HeadRows<const float> q;
    HeadRows<float> out;

    constexpr KeyRange seen_by(int64_t row) const {
        const int64_t position = row / groups + diagonal;
        return common({0, keys}, {position - behind, position + ahead + 1});
    }
};

// What some keys gave to a tile of rows lies in so many floats: the rows' maxima, their sums, and their
// weighted values, kMaxHeadDim apart.
constexpr int64_t kPartialFloats = 2 * kPage + kMostTileRows * kMaxHeadDim;

// A row's rotary positions (arXiv:2104.09864).
struct RowRotation {
    int64_t rotated;   // so many elements, the first, are turned; the rest stays as it is
    bool interleaved;  // elements 2i and 2i + 1 pair; else i and i + rotated / 2
    const float *cos, *sin;
};

struct CachedAttentionKernels {
    int64_t tile_rows;  // rows that a call of `attend` takes, at most kMostTileRows

    // What segments [first, last), at least one, give to rows first_row to first_row + tile_rows - 1, or as
    // many as there are. partial is aligned to 64 bytes.
    void (*attend)(const CachedHead& head, int64_t first_row, int64_t first, int64_t last, float* partial);

    // Joins `count` partials of these rows, one behind the other in order of their keys, and writes `out`.
    // No partial: zeros.
    void (*write)(const CachedHead& head, int64_t first_row, float* partials, int64_t count);

    // Writes a token's key (value) into its lane of a head's part of a page.
    void (*append_key)(CacheType type, const float* row, int64_t head_dim, int64_t lane, std::byte* keys);
    void (*append_value)(CacheType type, const float* row, int64_t head_dim, int64_t lane, std::byte* values);

    // In place is allowed.
    void (*rotate)(const float* row, int64_t head_dim, const RowRotation& rotation, float* out);
};

extern const CachedAttentionKernels kGenericCachedAttentionKernels;
#if defined(__x86_64__)
extern const CachedAttentionKernels kAvx2CachedAttentionKernels;
extern const CachedAttentionKernels kAvx512CachedAttentionKernels;
#endif

// The kernels of cpu_path().
const CachedAttentionKernels& cached_attention_kernels();

}  // namespace tandem
