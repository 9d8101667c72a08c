// The body of attention_kernels.h, compiled once a CPU path with that path's compiler flags.
//
// Scores are kept transposed, (keys, rows): a vector holds one key's scores for many rows, so the softmax of
// all rows runs down the vectors and nothing is ever summed across lanes. Blocks of keys are joined by the
// online softmax (Milakov and Gimelshein, arXiv:1805.02867), the backward pass recomputes probabilities from
// the saved log-sum-exp (FlashAttention, arXiv:2205.14135).
#pragma once

#include "attention_kernels.h"
#include "attention_scores_impl.h"

namespace tandem {
namespace {

// Long dot products are summed in pieces, which rounds less.
constexpr int64_t kDepth = 64;

// (keys in [begin, end), rows) products of keys or values with transposed rows.
inline void multiply_keys(const RowBlock& rows, const KeyRows& keys, int64_t begin, int64_t end,
                          const float* transposed, float* out) {
    const int64_t head_dim = rows.head.head_dim;
    for_each_run(rows.head, keys, begin, end, [&](int64_t j, const float* data, int64_t count) {
        float* place = out + (j - begin) * kRowBlock;
        for (int64_t d = 0; d < head_dim; d += kDepth)
            product<false>({data + d, keys.stride}, {transposed + d * kRowBlock, kRowBlock},
                           {place, kRowBlock, d == 0 ? Into::replace : Into::add}, count, rows.lanes,
                           at_most(kDepth, head_dim - d));
    });
}

// The softmax so far: the largest score of each row, the sum of exp(score - max), and the factor by which
// the last block shrank what was summed before it.
struct OnlineSoftmax {
    float max[kRowBlock], sum[kRowBlock], shrink[kRowBlock];

    OnlineSoftmax() {
        for (int64_t i = 0; i < kRowBlock; i += kWidth) {
            store(max + i, splat(-kInfinity));
            store(sum + i, splat(0.0f));
        }
    }

    // Replaces `keys` rows of scores by exp(score - max).
    void add_block(float* scores, int64_t keys, int64_t lanes) {
        for (int64_t i = 0; i < lanes; i += kWidth) {
            const Vec before = load(max + i);
            Vec top = before;
            for (int64_t j = 0; j < keys; ++j) top = larger(top, load(scores + j * kRowBlock + i));
            // A row that has seen no key yet has no maximum to subtract.
            const Vec base = keep_where(at_least(top, splat(-kLargest)), top);
            const Vec factor = exp_or_nan(before - base);
            Vec total = load(sum + i) * factor;
            for (int64_t j = 0; j < keys; ++j) {
                float* place = scores + j * kRowBlock + i;
                const Vec weight = exp_or_nan(load(place) - base);
                store(place, weight);
                total += weight;
            }
            store(max + i, top);
            store(sum + i, total);
            store(shrink + i, factor);
        }
    }

    // The same for one row whose scores lie side by side, with room for whole vectors.
    void add_single(float* scores, int64_t keys) {
        const int64_t lanes = whole_vectors(keys);
        for (int64_t j = keys; j < lanes; ++j) scores[j] = -kInfinity;
        Vec top = splat(max[0]);
        for (int64_t j = 0; j < lanes; j += kWidth) top = larger(top, load(scores + j));
        float tops[kWidth];
        store(tops, top);
        const float before = max[0];
        for (const float x : tops) max[0] = max[0] < x ? x : max[0];
        const float base = max[0] >= -kLargest ? max[0] : 0;
        shrink[0] = exp_or_nan(splat(before - base))[0];
        sum[0] *= shrink[0];
        for (int64_t j = 0; j < lanes; j += kWidth)
            store(scores + j, exp_or_nan(load(scores + j) - splat(base)));
        for (int64_t j = 0; j < keys; ++j) sum[0] += scores[j];
    }
};

inline void scale_row(const float* from, float factor, float* to, int64_t n) {
    int64_t d = 0;
    for (; d + kWidth <= n; d += kWidth) store(to + d, load(from + d) * factor);
    for (; d < n; ++d) to[d] = from[d] * factor;
}

// out (rows, width) += weights^T V over keys [begin, end), weights (keys, rows); `packed` is room for a block
// of values.
inline void add_values(const RowBlock& rows, Matrix weights, int64_t begin, int64_t end, float* packed,
                       float* out) {
    const AttentionHead& head = rows.head;
    for_each_run(head, head.v, begin, end, [&](int64_t j, const float* data, int64_t count) {
        Matrix values = {data, head.v.stride};
        if (rows.width != head.head_dim) {
            for (int64_t i = 0; i < count; ++i)
                copy_row(data + i * head.v.stride, packed + i * rows.width, head.head_dim, rows.width);
            values = {packed, rows.width};
        }
        const Matrix part = {weights.data + (j - begin) * weights.stride, weights.stride};
        product<true>(part, values, {out, rows.width, j > rows.begin ? Into::extend : Into::replace},
                      rows.count, rows.width, count);
    });
}

inline void write_rows(const RowBlock& rows, const OnlineSoftmax& softmax, const float* sums) {
    const AttentionHead& head = rows.head;
    float lse[kRowBlock], factor[kRowBlock];
    for (int64_t i = 0; i < rows.lanes; i += kWidth) {
        const Vec sum = load(softmax.sum + i);
        store(lse + i, log_sum_exp(load(softmax.max + i), sum));
        store(factor + i, select(at_least(splat(0.0f), sum), splat(0.0f), 1.0f / sum));
    }
    rows.for_each(head.out, [&](int64_t i, float* row) {
        scale_row(sums + i * rows.width, factor[i], row, head.head_dim);
    });
    if (head.lse.data != nullptr) rows.for_each(head.lse, [&](int64_t i, float* to) { *to = lse[i]; });
}

// Where a call keeps its blocks.
struct ForwardScratch {
    float *rows, *q, *out, *keys, *values, *scores, *strip;

    ForwardScratch(float* memory, int64_t width)
        : rows(memory),
          q(rows + kRowBlock * width),
          out(q + kRowBlock * width),
          keys(out + kRowBlock * width),
          values(keys + kKeyBlock * width),
          scores(values + kKeyBlock * width),
          strip(scores + kKeyBlock * kRowBlock) {}
};

void forward_rows(const RowBlock& rows, const ForwardScratch& scratch, OnlineSoftmax& softmax) {
    rows.transpose(scratch.rows, rows.head.softmax_scale, scratch.q);
    rows.for_each_key_block([&](int64_t begin, int64_t end) {
        multiply_keys(rows, rows.head.k, begin, end, scratch.q, scratch.scores);
        if (rows.head.softcap > 0) cap_scores(rows.head.softcap, end - begin, rows.lanes, scratch.scores);
        if (has_bias(rows.head)) BiasStrip(rows, begin, end, scratch.strip).add_to(scratch.scores);
        if (!rows.all_see(begin, end)) mask_block(rows, begin, end, scratch.scores);
        softmax.add_block(scratch.scores, end - begin, rows.lanes);
        for (int64_t i = 0; begin > rows.begin && i < rows.count; ++i)
            scale_row(scratch.out + i * rows.width, softmax.shrink[i], scratch.out + i * rows.width,
                      rows.width);
        add_values(rows, {scratch.scores, kRowBlock}, begin, end, scratch.values, scratch.out);
    });
}

// Keys [begin, end) to (width, kKeyBlock), zeros behind the last.
inline void transpose_keys(const RowBlock& rows, int64_t begin, int64_t end, float* packed,
                           float* transposed) {
    const int64_t width = rows.width, lanes = whole_vectors(end - begin);
    const KeyRows& keys = rows.head.k;
    for_each_run(rows.head, keys, begin, end, [&](int64_t j, const float* data, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
            copy_row(data + i * keys.stride, packed + (j - begin + i) * width, rows.head.head_dim, width);
    });
    fill_zero(packed + (end - begin) * width, (lanes - (end - begin)) * width);
    for (int64_t j = 0; j < lanes; j += 4)
        for (int64_t d = 0; d < width; d += 4)
            transpose_4x4(packed + j * width + d, width, 1.0f, transposed + d * kKeyBlock + j, kKeyBlock);
}

// One row, as in decoding, would fill one lane. Here the keys are the lanes; every sum runs in the same order
// as for many rows, so decoding a token gives the bits that prefill gives. The row's own limits are those of
// the keys, which leaves nothing to mask.
void forward_single(const RowBlock& rows, const ForwardScratch& scratch, OnlineSoftmax& softmax) {
    const int64_t head_dim = rows.head.head_dim;
    scale_row(scratch.rows, rows.head.softmax_scale, scratch.q, rows.width);
    rows.for_each_key_block([&](int64_t begin, int64_t end) {
        const int64_t lanes = whole_vectors(end - begin);
        transpose_keys(rows, begin, end, scratch.values, scratch.keys);
        for (int64_t d = 0; d < head_dim; d += kDepth)
            product<false>({scratch.q + d, 0}, {scratch.keys + d * kKeyBlock, kKeyBlock},
                           {scratch.scores, 0, d == 0 ? Into::replace : Into::add}, 1, lanes,
                           at_most(kDepth, head_dim - d));
        if (rows.head.softcap > 0) cap_scores(rows.head.softcap, 1, lanes, scratch.scores);
        if (has_bias(rows.head)) add_bias_to_single(rows, begin, lanes, scratch.strip, scratch.scores);
        softmax.add_single(scratch.scores, end - begin);
        if (begin > rows.begin) scale_row(scratch.out, softmax.shrink[0], scratch.out, rows.width);
        add_values(rows, {scratch.scores, 1}, begin, end, scratch.values, scratch.out);
    });
}

void forward(const AttentionHead& head, int64_t first_row, float* memory) {
    const RowBlock rows(head, first_row);
    const ForwardScratch scratch(memory, rows.width);
    rows.gather(head.q, scratch.rows);
    OnlineSoftmax softmax;
    if (rows.end <= rows.begin) fill_zero(scratch.out, rows.count * rows.width);
    (rows.count == 1 ? forward_single : forward_rows)(rows, scratch, softmax);
    write_rows(rows, softmax, scratch.out);
}

// A block of rows as the backward pass needs it, both ways round.
struct BackwardRows {
    float *q, *grad_out, *q_transposed, *grad_out_transposed;
    float lse[kRowBlock], delta[kRowBlock];

    // Delta is sum(grad_out * out), what the softmax's own gradient subtracts, less the gradient of lse.
    void read(const RowBlock& rows, const HeadGradients& gradients, float* spare) {
        rows.gather(rows.head.q, q);
        rows.transpose(q, rows.head.softmax_scale, q_transposed);
        rows.gather(gradients.grad_out, grad_out);
        rows.transpose(grad_out, 1.0f, grad_out_transposed);
        rows.gather(gradients.out, spare);
        // exp(score - inf) is the 0 that a row without keys wants, and the lanes behind the last row.
        for (int64_t i = 0; i < kRowBlock; ++i) {
            lse[i] = kInfinity;
            delta[i] = 0;
        }
        rows.for_each(gradients.lse, [&](int64_t i, const float* from) {
            lse[i] = *from == -kInfinity ? kInfinity : *from;
            delta[i] = dot(grad_out + i * rows.width, spare + i * rows.width, rows.width);
        });
        if (gradients.grad_lse.data != nullptr)
            rows.for_each(gradients.grad_lse, [&](int64_t i, const float* from) { delta[i] -= *from; });
    }

    // Scores to probabilities, and the gradients of probabilities to those of scores, times scale.
    void differentiate(float* scores, float* gradients, int64_t keys, int64_t lanes, float scale) const {
        for (int64_t i = 0; i < lanes; i += kWidth) {
            const Vec log_sum = load(lse + i), mean = load(delta + i);
            for (int64_t j = i; j < keys * kRowBlock; j += kRowBlock) {
                const Vec weight = exp_or_nan(load(scores + j) - log_sum);
                store(scores + j, weight);
                store(gradients + j, weight * (load(gradients + j) - mean) * scale);
            }
        }
    }
};

void backward(const AttentionHead& head, const HeadGradients& gradients, float* scratch) {
    const int64_t width = padded(head.head_dim), block = kRowBlock * width, all = head.keys * width;
    BackwardRows loaded;
    loaded.q = scratch;
    loaded.grad_out = loaded.q + block;
    loaded.q_transposed = loaded.grad_out + block;
    loaded.grad_out_transposed = loaded.q_transposed + block;
    float* grad_q = loaded.grad_out_transposed + block;
    float* scores = grad_q + block;
    float* grad_scores = scores + kKeyBlock * kRowBlock;
    float* slopes = grad_scores + kKeyBlock * kRowBlock;
    float* keys = slopes + kKeyBlock * kRowBlock;
    float* grad_k = keys + all;
    float* grad_v = grad_k + all;
    float* strip = grad_v + all;
    const bool shaped = head.softcap > 0 || has_bias(head);
    for (int64_t j = 0; j < head.keys; ++j)
        copy_row(head.k.data + j * head.k.stride, keys + j * width, head.head_dim, width);
    fill_zero(grad_k, 2 * all);
    for (int64_t first = 0; first < head.queries * head.groups; first += kRowBlock) {
        const RowBlock rows(head, first);
        loaded.read(rows, gradients, grad_q);
        fill_zero(grad_q, block);
        rows.for_each_key_block([&](int64_t begin, int64_t end) {
            const int64_t count = end - begin;
            multiply_keys(rows, head.k, begin, end, loaded.q_transposed, scores);
            multiply_keys(rows, head.v, begin, end, loaded.grad_out_transposed, grad_scores);
            if (head.softcap > 0) cap_scores(head.softcap, count, rows.lanes, scores, slopes);
            if (has_bias(head)) BiasStrip(rows, begin, end, strip).add_to(scores);
            if (!rows.all_see(begin, end)) mask_block(rows, begin, end, scores);
            loaded.differentiate(scores, grad_scores, count, rows.lanes, shaped ? 1.0f : head.softmax_scale);
            if (gradients.grad_bias != nullptr)
                BiasStrip(rows, begin, end, strip).add_gradient(grad_scores, gradients.grad_bias);
            if (shaped) chain_block(head, slopes, count, rows.lanes, grad_scores);
            product<false>({scores, kRowBlock}, {loaded.grad_out, width},
                           {grad_v + begin * width, width, Into::add}, count, width, rows.count);
            product<false>({grad_scores, kRowBlock}, {loaded.q, width},
                           {grad_k + begin * width, width, Into::add}, count, width, rows.count);
            product<true>({grad_scores, kRowBlock}, {keys + begin * width, width}, {grad_q, width, Into::add},
                          rows.count, width, count);
        });
        rows.for_each(gradients.grad_q, [&](int64_t i, float* row) {
            copy_row(grad_q + i * width, row, head.head_dim, head.head_dim);
        });
    }
    for (int64_t j = 0; j < head.keys; ++j) {
        copy_row(grad_k + j * width, gradients.grad_k + j * gradients.grad_k_stride, head.head_dim,
                 head.head_dim);
        copy_row(grad_v + j * width, gradients.grad_v + j * gradients.grad_v_stride, head.head_dim,
                 head.head_dim);
    }
}

constexpr AttentionKernels kAttentionKernels = {forward, backward};

}  // namespace
}  // namespace tandem
