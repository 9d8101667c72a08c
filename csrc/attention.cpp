#include "attention.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "attention_kernels.h"
#include "parallel.h"

namespace tandem {
namespace {

constexpr int64_t kMostStreamed = 65536;  // floats of one tensor: a few of them fit the second-level cache

// Where one sequence begins in what is padded or packed, and how long it is.
struct Span {
    int64_t batch, token, length;
};

Span span_of(const int32_t* cu_seqlens, int64_t b, int64_t length) {
    if (cu_seqlens == nullptr) return {b, 0, length};
    return {0, cu_seqlens[b], cu_seqlens[b + 1] - cu_seqlens[b]};
}

template <class T>
T* at(const TokenRows<T>& rows, const Span& span, int64_t head) {
    return rows.data + span.batch * rows.batch_stride + span.token * rows.token_stride +
           head * rows.head_stride;
}

// How many distances a head's row of biases holds.
int64_t bias_width(int64_t max_distance) { return 2 * max_distance + 1; }

// One kv head of one sequence, and the queries that read it.
struct Place {
    const AttentionBatch& batch;
    Span queries, keys;
    int64_t groups, kv_head;

    Place(const AttentionBatch& whole, int64_t b, int64_t head)
        : batch(whole),
          queries(span_of(whole.cu_seqlens_q, b, whole.seqlen_q)),
          keys(span_of(whole.cu_seqlens_k, b, whole.seqlen_k)),
          groups(whole.heads / whole.kv_heads),
          kv_head(head) {
        if (whole.block_table != nullptr) keys.length = whole.key_lengths[b];
    }

    template <class T>
    HeadRows<T> rows(const TokenRows<T>& all) const {
        return {at(all, queries, kv_head * groups), all.token_stride, all.head_stride};
    }

    template <class T>
    HeadRows<T> floats(const HeadFloats<T>& all) const {
        if (all.data == nullptr) return {nullptr, 0, 0};
        return {
            all.data + queries.batch * all.batch_stride + queries.token + kv_head * groups * all.head_stride,
            1, all.head_stride};
    }

    KeyRows key_rows(const TokenRows<const float>& all) const {
        if (batch.block_table == nullptr) return {at(all, keys, kv_head), all.token_stride, 0};
        return {all.data + kv_head * all.head_stride, all.token_stride, all.batch_stride};
    }

    AttentionHead head(int64_t b) const {
        AttentionHead head{};
        head.q = rows(batch.q);
        head.k = key_rows(batch.k);
        head.v = key_rows(batch.v);
        head.blocks = batch.block_table == nullptr ? nullptr : batch.block_table + b * batch.table_stride;
        head.block_size = batch.block_size;
        head.groups = groups;
        head.queries = queries.length;
        // The diagonal belongs to the padded rectangle, however many of its keys are real.
        head.diagonal = keys.length - queries.length;
        head.keys = batch.key_lengths == nullptr ? keys.length : batch.key_lengths[b];
        head.head_dim = batch.head_dim;
        head.behind = batch.options.window > 0 ? std::min(batch.options.window - 1, kFar) : kFar;
        head.ahead = batch.causal ? 0 : head.behind;
        head.softmax_scale = batch.softmax_scale;
        head.softcap = batch.options.softcap;
        head.bias = bias();
        return head;
    }

    DistanceBias bias() const {
        const ScoreOptions& options = batch.options;
        const int64_t first = kv_head * groups;
        DistanceBias bias{nullptr, options.max_distance, nullptr};
        if (options.distance_bias != nullptr)
            bias.rows = options.distance_bias + first * bias_width(options.max_distance);
        if (options.alibi_slopes != nullptr) bias.slopes = options.alibi_slopes + first;
        return bias;
    }
};

int64_t longest(const int32_t* cu_seqlens, int64_t batch, int64_t padded_length) {
    if (cu_seqlens == nullptr) return padded_length;
    int64_t length = 0;
    for (int64_t b = 0; b < batch; ++b) length = std::max<int64_t>(length, cu_seqlens[b + 1] - cu_seqlens[b]);
    return length;
}

// Each thread's own, kept between calls, on a boundary of 64 bytes.
float* scratch_of(int64_t floats) {
    thread_local std::vector<float> memory;
    if (memory.size() < static_cast<size_t>(floats + 16)) memory.resize(static_cast<size_t>(floats + 16));
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64 / sizeof(float);
}

// As team.for_each, but a thread takes several tasks at a time, a multiple of `unit`.
template <class Body>
void for_each_chunk(Team& team, int64_t tasks, int64_t unit, Body body) {
    const int64_t units = std::max<int64_t>(1, tasks / unit / (int64_t{team.size()} * 8));
    team.for_each((tasks + units * unit - 1) / (units * unit), [&](int64_t chunk) {
        const int64_t end = std::min(tasks, (chunk + 1) * units * unit);
        for (int64_t i = chunk * units * unit; i < end; ++i) body(i);
    });
}

// With enough sequences for every thread, each is handled by one of them.
bool keeps_sequences_whole(const AttentionBatch& batch, int num_threads) {
    return batch.batch >= 4 * int64_t{num_threads};
}

void zero_keys(float* rows, int64_t stride, int64_t begin, int64_t end, int64_t head_dim) {
    for (int64_t j = begin; j < end; ++j) std::fill_n(rows + j * stride, head_dim, 0.0f);
}

// Reads a number of every line of a sequence that is not long, all heads of a token in turn. A head's own
// rows lie too far apart for the hardware to prefetch, and there is too little to compute to hide the wait:
// this makes one stream of them, and the backward pass a quarter faster. (Prefetch instructions do not.)
void stream_in(const TokenRows<const float>& rows, const Span& span, int64_t heads, int64_t head_dim) {
    const float* row = at(rows, span, 0);
    for (int64_t t = 0; t < span.length; ++t, row += rows.token_stride)
        for (int64_t i = 0; i < heads * head_dim; i += 16)
            static_cast<void>(*static_cast<const volatile float*>(row + i));
}

void stream_in_queries(const Place& place, const TokenRows<const float>& rows) {
    const AttentionBatch& batch = place.batch;
    if (place.queries.length * batch.heads * batch.head_dim > kMostStreamed) return;
    stream_in(rows, place.queries, batch.heads, batch.head_dim);
}

void stream_in_keys(const Place& place, int64_t b, const TokenRows<const float>& rows) {
    const AttentionBatch& batch = place.batch;
    if (place.keys.length * batch.kv_heads * batch.head_dim > kMostStreamed) return;
    if (batch.block_table == nullptr) return stream_in(rows, place.keys, batch.kv_heads, batch.head_dim);
    for (int64_t begin = 0; begin < place.keys.length; begin += batch.block_size) {
        const int32_t block = batch.block_table[b * batch.table_stride + begin / batch.block_size];
        const int64_t count = std::min(batch.block_size, place.keys.length - begin);
        stream_in(rows, {block, 0, count}, batch.kv_heads, batch.head_dim);
    }
}

void stream_in_inputs(const Place& place, int64_t b) {
    stream_in_queries(place, place.batch.q);
    stream_in_keys(place, b, place.batch.k);
    stream_in_keys(place, b, place.batch.v);
}

// Each sequence's share of the gradient of the distance biases, summed in their order, whoever computed them.
class BiasGradients {
  public:
    BiasGradients(const AttentionBatch& batch, float* result)
        : batch_(batch), result_(result), width_(bias_width(batch.options.max_distance)) {
        if (result != nullptr) shares_.resize(static_cast<size_t>(batch.batch * batch.heads * width_));
    }

    double* share(int64_t b, int64_t head) {
        return result_ == nullptr ? nullptr : shares_.data() + (b * batch_.heads + head) * width_;
    }

    void sum() const {
        if (result_ == nullptr) return;
        const int64_t size = batch_.heads * width_;
        std::vector<double> totals(static_cast<size_t>(size));
        for (auto one = shares_.begin(); one != shares_.end(); one += size)
            std::transform(totals.begin(), totals.end(), one, totals.begin(), std::plus<>());
        std::transform(totals.begin(), totals.end(), result_, [](double x) { return static_cast<float>(x); });
    }

  private:
    const AttentionBatch& batch_;
    float* result_;
    int64_t width_;
    std::vector<double> shares_;
};

}  // namespace

void attention_forward(const AttentionBatch& batch, const TokenRows<float>& out, const HeadFloats<float>& lse,
                       Team& team) {
    const AttentionKernels& kernels = attention_kernels();
    const int64_t groups = batch.heads / batch.kv_heads;
    const int64_t rows = longest(batch.cu_seqlens_q, batch.batch, batch.seqlen_q) * groups;
    const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
    const bool whole = keeps_sequences_whole(batch, team.size());
    const int64_t tasks = batch.kv_heads * blocks;
    for_each_chunk(team, batch.batch * tasks, whole ? tasks : 1, [&](int64_t task) {
        const int64_t b = task / blocks / batch.kv_heads, first_row = task % blocks * kRowBlock;
        const Place place(batch, b, task / blocks % batch.kv_heads);
        if (first_row >= place.queries.length * groups) return;
        if (whole && place.kv_head == 0 && first_row == 0) stream_in_inputs(place, b);
        AttentionHead head = place.head(b);
        head.out = place.rows(out);
        head.lse = place.floats(lse);
        kernels.forward(head, first_row, scratch_of(forward_scratch(batch.head_dim, groups)));
    });
}

void attention_backward(const AttentionBatch& batch, const AttentionGradients& g, int num_threads) {
    const AttentionKernels& kernels = attention_kernels();
    const bool whole = keeps_sequences_whole(batch, num_threads);
    BiasGradients biases(batch, g.grad_distance_bias);
    const int64_t tasks = batch.batch * batch.kv_heads;
    run_team(num_threads, [&](Team& team) {
        for_each_chunk(team, tasks, whole ? batch.kv_heads : 1, [&](int64_t task) {
            const int64_t b = task / batch.kv_heads;
            const Place place(batch, b, task % batch.kv_heads);
            const AttentionHead head = place.head(b);
            if (whole && place.kv_head == 0) {
                stream_in_inputs(place, b);
                stream_in_queries(place, g.out);
                stream_in_queries(place, g.grad_out);
            }
            HeadGradients gradients{};
            gradients.out = place.rows(g.out);
            gradients.grad_out = place.rows(g.grad_out);
            gradients.lse = place.floats(g.lse);
            gradients.grad_lse = place.floats(g.grad_lse);
            gradients.grad_q = place.rows(g.grad_q);
            gradients.grad_k = at(g.grad_k, place.keys, place.kv_head);
            gradients.grad_v = at(g.grad_v, place.keys, place.kv_head);
            gradients.grad_k_stride = g.grad_k.token_stride;
            gradients.grad_v_stride = g.grad_v.token_stride;
            gradients.grad_bias = biases.share(b, place.kv_head * place.groups);
            float* scratch = scratch_of(backward_scratch(batch.head_dim, place.groups, head.keys));
            kernels.backward(head, gradients, scratch);
            zero_keys(gradients.grad_k, g.grad_k.token_stride, head.keys, place.keys.length, batch.head_dim);
            zero_keys(gradients.grad_v, g.grad_v.token_stride, head.keys, place.keys.length, batch.head_dim);
        });
    });
    biases.sum();
}

}  // namespace tandem
