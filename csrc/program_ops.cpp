#include "program_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tandem {
namespace {

// Rows of some microseconds' work.
constexpr int64_t kRowsAtOnce = 4;

template <class Body>
void for_rows(Team& team, int64_t rows, const Body& body) {
    team.for_each((rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t task) {
        const int64_t end = std::min(rows, (task + 1) * kRowsAtOnce);
        for (int64_t row = task * kRowsAtOnce; row < end; ++row) body(row);
    });
}

const float* data_or_null(const std::vector<float>& numbers) {
    return numbers.empty() ? nullptr : numbers.data();
}

}  // namespace

void Embed::run(const Step& step, Activations& activations, Team& team) const {
    float* rows = activations.floats(out);
    const int64_t stride = activations.stride(out), width = tokens->matrix().inputs;
    for_rows(team, step.tokens, [&](int64_t t) {
        float* row = rows + t * stride;
        unpack_row(tokens->matrix(), step.token_ids[t], row);
        const float* position = data_or_null(positions);
        if (position != nullptr) position += (step.positions[t] + offset) * width;
        for (int64_t i = 0; i < width; ++i)
            row[i] = row[i] * scale + (position == nullptr ? 0.0f : position[i]);
    });
}

void RotaryAngles::run(const Step& step, Activations& activations, Team& team) const {
    const size_t half = frequencies.size();
    team.once([&] {
        const size_t size = static_cast<size_t>(step.tokens) * half;
        if (activations.rotary_cos.size() < size) {
            activations.rotary_cos.resize(size);
            activations.rotary_sin.resize(size);
        }
    });
    for_rows(team, step.tokens, [&](int64_t t) {
        const auto position = static_cast<float>(step.positions[t]);
        for (size_t i = 0; i < half; ++i) {
            const size_t place = static_cast<size_t>(t) * half + i;
            activations.rotary_cos[place] = std::cos(position * frequencies[i]) * factor;
            activations.rotary_sin[place] = std::sin(position * frequencies[i]) * factor;
        }
    });
}

void Norm::run(const Step& step, Activations& activations, Team& team) const {
    const auto kernel = elementwise_kernels().norm;
    const auto quantize = linear_kernels().quantize;
    const auto width = static_cast<int64_t>(weight.size());
    const NormWeights weights = {weight.data(), data_or_null(bias), eps, subtract_mean};
    const float* from = activations.floats(x) + column;
    float* to = activations.floats(out) + column;
    const int64_t stride = activations.stride(x), out_stride = activations.stride(out);
    for_rows(team, selected ? step.num_selected : step.tokens, [&](int64_t row) {
        const float* one = from + (selected ? step.selected[row] : row) * stride;
        float* result = to + row * out_stride;
        if (added == kNone) {
            for (int64_t head = 0; head < heads; ++head)
                kernel(one + head * width, width, weights, result + head * width);
        } else {
            float* normed = activations.floats(x) + row * stride;
            const float* other = activations.floats(added) + row * activations.stride(added);
            kernel(normed, width, weights, normed);
            for (int64_t i = 0; i < width; ++i) result[i] = normed[i] + other[i];
        }
        if (bytes != kNone) quantize(result, width, group, activations.bytes(bytes), row);
    });
}

void Quantize::run(const Step& step, Activations& activations, Team& team) const {
    quantize_rows({activations.floats(x), activations.stride(x)}, selected ? step.num_selected : step.tokens,
                  activations.width(x), group, activations.bytes(bytes), team);
}

void LinearLayer::run(const Step& step, Activations& activations, Team& team) const {
    LinearBatch batch{};
    batch.weight = &weight->matrix();
    if (x != kNone) batch.x = {activations.floats(x), activations.stride(x)};
    if (bytes != kNone) batch.bytes = activations.bytes(bytes);
    batch.epilogue = {data_or_null(bias),     activation, gated, nullptr, 0, activations.floats(out),
                      activations.stride(out)};
    if (residual != kNone) {
        batch.epilogue.residual = activations.floats(residual);
        batch.epilogue.residual_stride = activations.stride(residual);
    }
    batch.then = then;
    linear(batch, step.tokens, team);
}

void Head::run(const Step& step, Activations& activations, Team& team) const {
    LinearBatch batch{};
    batch.weight = &weight->matrix();
    if (x != kNone) batch.x = {activations.floats(x), activations.stride(x)};
    if (bytes != kNone) batch.bytes = activations.bytes(bytes);
    batch.epilogue = {data_or_null(bias), ActivationKind::none, false, nullptr, 0, step.out, step.out_stride};
    linear(batch, step.num_selected, team);
    if (softcap == 0.0f) return;
    for_rows(team, step.num_selected, [&](int64_t row) {
        float* logits = step.out + row * step.out_stride;
        for (int64_t i = 0; i < weight->matrix().outputs; ++i)
            logits[i] = softcap * std::tanh(logits[i] / softcap);
    });
}

void Select::run(const Step& step, Activations& activations, Team& team) const {
    const int64_t width = activations.width(x), stride = activations.stride(x);
    for_rows(team, step.num_selected, [&](int64_t row) {
        const float* from = activations.floats(x) + step.selected[row] * stride;
        float* to = activations.floats(out) + row * activations.stride(out);
        for (int64_t i = 0; i < width; ++i) to[i] = from[i] * scale;
    });
}

void Deliver::run(const Step& step, Activations& activations, Team& team) const {
    const auto width = static_cast<size_t>(activations.width(x));
    for_rows(team, step.num_selected, [&](int64_t row) {
        std::memcpy(step.out + row * step.out_stride,
                    activations.floats(x) + step.selected[row] * activations.stride(x),
                    width * sizeof(float));
    });
}

ScoreOptions AttentionLayer::options() const {
    return {window, softcap, data_or_null(alibi_slopes), data_or_null(distance_bias), max_distance};
}

void Append::run(const Step& step, Activations& activations, Team& team) const {
    CacheLayer<std::byte> cache = layer.cache;
    cache.data = step.cache + layer.layer_offset;
    float* rows = activations.floats(x);
    const int64_t stride = activations.stride(x), head_dim = cache.head_dim;
    const int64_t value_column = key_column + cache.kv_heads * head_dim;
    NewTokens tokens{};
    tokens.tokens = step.tokens;
    tokens.heads = layer.heads;
    tokens.k = {rows + key_column, stride, head_dim};
    tokens.v = {rows + value_column, stride, head_dim};
    tokens.q = {key_column == 0 ? nullptr : rows, stride, head_dim};
    tokens.slots = step.slots;
    if (rotated > 0)
        tokens.rotation = {rotated, false, activations.rotary_cos.data(), activations.rotary_sin.data()};
    append(cache, tokens, team);
}

void Attend::run(const Step& step, Activations& activations, Team& team) const {
    const SequenceTable& table = source ? step.source : step.own;
    CachedBatch batch{};
    const CacheLayer<std::byte>& cache = layer.cache;
    batch.cache = {step.cache + layer.layer_offset,
                   cache.block_bytes,
                   cache.block_size,
                   cache.type,
                   cache.kv_heads,
                   cache.head_dim};
    batch.batch = step.sequences;
    batch.heads = layer.heads;
    batch.q = {activations.floats(x), activations.stride(x), cache.head_dim};
    batch.out = {activations.floats(out), activations.stride(out), cache.head_dim};
    batch.cu_seqlens_q = step.cu_seqlens;
    batch.cache_seqlens = table.lengths;
    batch.block_table = table.blocks;
    batch.table_stride = table.stride;
    batch.causal = !source;
    batch.softmax_scale = layer.softmax_scale;
    batch.options = layer.options();
    attend(batch, activations.attention, team);
}

void AttendWithin::run(const Step& step, Activations& activations, Team& team) const {
    const int64_t head_dim = layer.cache.head_dim, kv_heads = layer.cache.kv_heads;
    float* rows = activations.floats(x);
    const int64_t stride = activations.stride(x);
    if (rotated > 0) {
        const auto rotate = cached_attention_kernels().rotate;
        for_rows(team, step.tokens, [&](int64_t t) {
            const RowRotation rotation = {rotated, false, activations.rotary_cos.data() + t * rotated / 2,
                                          activations.rotary_sin.data() + t * rotated / 2};
            for (int64_t head = 0; head < layer.heads + kv_heads; ++head) {
                float* row = rows + t * stride + head * head_dim;
                rotate(row, head_dim, rotation, row);
            }
        });
    }
    AttentionBatch batch{};
    batch.batch = step.sequences;
    batch.heads = layer.heads;
    batch.kv_heads = kv_heads;
    batch.head_dim = head_dim;
    batch.q = {rows, 0, stride, head_dim};
    batch.k = {rows + layer.heads * head_dim, 0, stride, head_dim};
    batch.v = {rows + (layer.heads + kv_heads) * head_dim, 0, stride, head_dim};
    batch.seqlen_q = batch.seqlen_k = step.longest;
    batch.cu_seqlens_q = batch.cu_seqlens_k = step.cu_seqlens;
    batch.causal = causal;
    batch.softmax_scale = layer.softmax_scale;
    batch.options = layer.options();
    attention_forward(batch, {activations.floats(out), 0, activations.stride(out), head_dim}, {}, team);
}

}  // namespace tandem
