// The body of cached_attention_kernels.h, compiled once a CPU path with that path's compiler flags.
#pragma once

#include "cache_append_impl.h"
#include "cached_attention_kernels.h"
#include "cached_products_impl.h"
#include "cached_scores_impl.h"

namespace tandem {
namespace {

inline void scale_into(const float* from, float factor, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i) * factor);
    for (; i < n; ++i) to[i] = from[i] * factor;
}

// The next one from n on, for n from 1 to 8.
inline int64_t power_of_two(int64_t n) {
    if (n > 4) return 8;
    return n == 3 ? 4 : n;
}

// Some consecutive rows of a head, and the keys they see.
struct QueryTile {
    const CachedHead& head;
    int64_t first, count;
    int64_t padded_count;  // a power of two, for which there are products
    int64_t width;
    KeyRange all;   // the keys that any of the rows sees
    KeyRange each;  // those that every row sees

    QueryTile(const CachedHead& h, int64_t first_row)
        : head(h),
          first(first_row),
          count(at_most(kQueryRows, h.queries * h.groups - first_row)),
          padded_count(power_of_two(count)),
          width(page_width(h.cache.head_dim)) {
        const KeyRange low = h.seen_by(first), high = h.seen_by(first + count - 1);
        all = {low.begin, high.end};
        each = common(low, high);
    }

    // The rows' queries, scaled; zeros where there is no row.
    void read_queries(float* q) const {
        for_each_row(head.q, head.groups, first, count, [&](int64_t i, const float* row) {
            scale_into(row, head.softmax_scale, head.cache.head_dim, q + i * kRowStride);
        });
        for (int64_t i = count; i < padded_count; ++i) fill_zero(q + i * kRowStride, width);
    }
};

// A tile's kPartialFloats.
struct Partial {
    float *max, *sum, *out;

    explicit Partial(float* memory) : max(memory), sum(memory + kPage), out(memory + 2 * kPage) {}
};

// Rows whose keys differ walk alone over those that not all of them see, so that no row reads a value it must
// not see: its weight would be 0, but 0 times infinity is no number.
template <class T>
void add_values_seen(const QueryTile& tile, const Pages& pages, KeyRange segment, const float* weights,
                     float* out) {
    KeyRange shared = common(tile.each, segment);
    if (shared.end <= shared.begin) shared = {segment.begin, segment.begin};
    const auto add_alone = [&](KeyRange range) {
        for (int64_t i = 0; i < tile.count; ++i)
            add_values<T, 1>(pages, common(range, tile.head.seen_by(tile.first + i)),
                             weights + i * kScoreStride, tile.width, out + i * kRowStride);
    };
    const KeyRange seen = common(tile.all, segment);
    if (seen.begin < shared.begin) add_alone({segment.begin, shared.begin});
    products<T>(tile.padded_count).add_values(pages, shared, weights, tile.width, out);
    if (seen.end > shared.end) add_alone({shared.end, segment.end});
}

template <class T>
void attend_segment(const QueryTile& tile, const float* q, int64_t index, Partial partial) {
    const KeyRange segment = {index * kSegment, (index + 1) * kSegment};
    const Pages pages(tile.head, common(tile.all, segment));
    alignas(64) float scores[kQueryRows * kScoreStride];
    products<T>(tile.padded_count).multiply_keys(pages, q, tile.head.cache.head_dim, scores);
    for (int64_t i = 0; i < tile.count; ++i) {
        const KeyRange seen = common(tile.head.seen_by(tile.first + i), segment);
        RowScores<T> row(tile.head, tile.first + i, seen, pages, scores + i * kScoreStride);
        partial.max[i] = row.finish_scores();
        partial.sum[i] = row.to_weights(partial.max[i]);
    }
    for (int64_t i = 0; i < tile.padded_count; ++i) fill_zero(partial.out + i * kRowStride, tile.width);
    add_values_seen<T>(tile, pages, segment, scores, partial.out);
}

// Joins what later keys gave a row to what earlier ones gave it. Keys without weight change nothing.
inline void join_row(Partial total, Partial next, int64_t i, int64_t width) {
    if (next.sum[i] == 0) return;
    float *out = total.out + i * kRowStride, *from = next.out + i * kRowStride;
    if (total.sum[i] == 0) {
        copy_row(from, out, width, width);
        total.max[i] = next.max[i];
        total.sum[i] = next.sum[i];
        return;
    }
    const float before = total.max[i], after = next.max[i], top = before < after ? after : before;
    const Vec keep = exp_or_nan(splat(before - top)), take = exp_or_nan(splat(after - top));
    for (int64_t d = 0; d < width; d += kWidth)
        store(out + d, multiply_add(load(out + d), keep, load(from + d) * take));
    total.max[i] = top;
    total.sum[i] = total.sum[i] * keep[0] + next.sum[i] * take[0];
}

inline void join(Partial total, Partial next, const QueryTile& tile) {
    for (int64_t i = 0; i < tile.count; ++i) join_row(total, next, i, tile.width);
}

template <class T>
void attend_as(const CachedHead& head, int64_t first_row, int64_t first, int64_t last, float* partial) {
    const QueryTile tile(head, first_row);
    alignas(64) float q[kQueryRows * kRowStride];
    tile.read_queries(q);
    attend_segment<T>(tile, q, first, Partial(partial));
    for (int64_t index = first + 1; index < last; ++index) {
        alignas(64) float memory[kPartialFloats];
        attend_segment<T>(tile, q, index, Partial(memory));
        join(Partial(partial), Partial(memory), tile);
    }
}

void attend(const CachedHead& head, int64_t first_row, int64_t first, int64_t last, float* partial) {
    switch (head.cache.type) {
        case CacheType::float32:
            return attend_as<float>(head, first_row, first, last, partial);
        case CacheType::bfloat16:
            return attend_as<uint16_t>(head, first_row, first, last, partial);
        case CacheType::int8:
            return attend_as<int8_t>(head, first_row, first, last, partial);
    }
}

void write(const CachedHead& head, int64_t first_row, float* partials, int64_t count) {
    const QueryTile tile(head, first_row);
    const int64_t head_dim = head.cache.head_dim;
    for (int64_t n = 1; n < count; ++n) join(Partial(partials), Partial(partials + n * kPartialFloats), tile);
    const Partial total(partials);
    for_each_row(head.out, head.groups, first_row, tile.count, [&](int64_t i, float* row) {
        const float sum = count == 0 ? 0 : total.sum[i];
        if (sum == 0) {
            for (int64_t d = 0; d < head_dim; ++d) row[d] = 0;
            return;
        }
        scale_into(total.out + i * kRowStride, 1 / sum, head_dim, row);
    });
}

constexpr CachedAttentionKernels kCachedAttentionKernels = {kQueryRows, attend,       write,
                                                            append_key, append_value, rotate};

}  // namespace
}  // namespace tandem
