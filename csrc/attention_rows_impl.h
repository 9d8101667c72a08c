// The rows and keys of a head as attention's blocks take them, compiled once a CPU path.
#pragma once

#include "attention_kernels.h"
#include "attention_math_impl.h"

namespace tandem {
namespace {

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

inline int64_t whole_vectors(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

// Calls body(i, pointer to row first + i) for `count` rows, with one division for all of them.
template <class T, class Body>
inline void for_each_row(const HeadRows<T>& rows, int64_t groups, int64_t first, int64_t count, Body body) {
    T* token = rows.data + first / groups * rows.token_stride;
    int64_t head = first % groups;
    for (int64_t i = 0; i < count; ++i) {
        body(i, token + head * rows.head_stride);
        if (++head < groups) continue;
        head = 0;
        token += rows.token_stride;
    }
}

inline void copy_row(const float* from, float* to, int64_t n, int64_t padded_n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
    for (; i < n; ++i) to[i] = from[i];
    for (; i < padded_n; ++i) to[i] = 0;
}

inline void fill_zero(float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += kWidth) store(to + i, splat(0.0f));
}

// Some consecutive rows of a head, and how far they see.
struct RowBlock {
    const AttentionHead& head;
    int64_t first, count, lanes;                      // lanes: count in whole vectors
    int64_t width;                                    // padded head_dim
    int64_t begin, end;                               // the keys that any of the rows sees
    int64_t all_begin, all_end;                       // those that all of them see
    float first_key[kRowBlock], last_key[kRowBlock];  // of each row where they differ; exact below 2^24

    RowBlock(const AttentionHead& h, int64_t first_row)
        : head(h),
          first(first_row),
          count(at_most(kRowBlock, h.queries * h.groups - first_row)),
          lanes(whole_vectors(count)),
          width(padded(h.head_dim)),
          begin(larger(0, low() - h.behind)),
          end(at_most(h.keys, high() + h.ahead + 1)),
          all_begin(larger(0, high() - h.behind)),
          all_end(at_most(h.keys, low() + h.ahead + 1)) {
        if (all_see(begin, end)) return;
        for (int64_t i = 0; i < kRowBlock; ++i) {
            const int64_t position = (first + i) / h.groups + h.diagonal;
            first_key[i] = static_cast<float>(position - h.behind);
            last_key[i] = static_cast<float>(position + h.ahead);
        }
    }

    // Where the first and the last row stand among the keys.
    int64_t low() const { return first / head.groups + head.diagonal; }
    int64_t high() const { return (first + count - 1) / head.groups + head.diagonal; }

    // Whether every row sees every key in [from, to).
    bool all_see(int64_t from, int64_t to) const { return from >= all_begin && to <= all_end; }

    // Calls body(from, to) for the keys in blocks that end at multiples of kKeyBlock, wherever they begin:
    // how a row's keys are cut does not depend on the rows beside it.
    template <class Body>
    void for_each_key_block(Body body) const {
        for (int64_t from = begin, to; from < end; from = to) {
            to = at_most((from / kKeyBlock + 1) * kKeyBlock, end);
            body(from, to);
        }
    }

    template <class T, class Body>
    void for_each(const HeadRows<T>& rows, Body body) const {
        for_each_row(rows, head.groups, first, count, body);
    }

    // Copies the rows side by side, zeros behind each and behind the last.
    void gather(const HeadRows<const float>& rows, float* to) const {
        for_each(rows,
                 [&](int64_t i, const float* row) { copy_row(row, to + i * width, head.head_dim, width); });
        fill_zero(to + count * width, (lanes - count) * width);
    }

    // Gathered rows to (width, kRowBlock), times factor.
    void transpose(const float* from, float factor, float* to) const {
        for (int64_t i = 0; i < lanes; i += 4)
            for (int64_t d = 0; d < width; d += 4)
                transpose_4x4(from + i * width + d, width, factor, to + d * kRowBlock + i, kRowBlock);
    }
};

// Calls body(first key, pointer to it, how many) for each run of equally spaced keys in [begin, end).
template <class Body>
inline void for_each_run(const AttentionHead& head, const KeyRows& keys, int64_t begin, int64_t end,
                         Body body) {
    if (head.blocks == nullptr) return body(begin, keys.data + begin * keys.stride, end - begin);
    while (begin < end) {
        const int64_t offset = begin % head.block_size;
        const int64_t count = at_most(head.block_size - offset, end - begin);
        const float* block = keys.data + head.blocks[begin / head.block_size] * keys.block_stride;
        body(begin, block + offset * keys.stride, count);
        begin += count;
    }
}

}  // namespace
}  // namespace tandem
