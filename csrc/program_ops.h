// The operations that a program is made of. Numbers of activations name the rows they read and write.
#pragma once

#include <memory>
#include <vector>

#include "elementwise_kernels.h"
#include "program.h"

namespace tandem {

constexpr int kNone = -1;

// out = scale * embedding of each token, and where there are rows of positions, that of position + offset.
class Embed : public Op {
  public:
    std::shared_ptr<const PackedWeight> tokens;
    float scale;
    std::vector<float> positions;  // (count, width); empty: none
    int64_t offset;
    int out;
    void run(const Step&, Activations&, Team&) const override;
};

// cos and sin of each token's angles, for all layers.
class RotaryAngles : public Op {
  public:
    std::vector<float> frequencies;  // (rotated / 2,) radians a position
    float factor;
    void run(const Step&, Activations&, Team&) const override;
};

// The norm of each row, or of each of `heads` runs of numbers in it, from a column on.
class Norm : public Op {
  public:
    std::vector<float> weight, bias;  // bias empty: none
    float eps;
    bool subtract_mean;
    int x, out;
    int64_t column, heads;
    int added;  // rows that are added to the norm, which also takes x's place; kNone: none
    int bytes;  // the norm rounded to eight bits; kNone: not wanted
    int64_t group;
    bool selected;  // only the rows of the step's selection, which are then side by side
    void run(const Step&, Activations&, Team&) const override;
};

class Quantize : public Op {
  public:
    int x, bytes;
    int64_t group;
    bool selected;  // as many rows as are selected, which are side by side
    void run(const Step&, Activations&, Team&) const override;
};

class LinearLayer : public Op {
  public:
    std::shared_ptr<const PackedWeight> weight;
    std::vector<float> bias;  // (chunks * kChunk,); empty: none
    ActivationKind activation;
    bool gated;
    int x, bytes;  // one of them
    int residual, out;
    const PackedMatrix* then;  // the weight that is read next
    void run(const Step&, Activations&, Team&) const override;
    OpKind kind() const override { return OpKind::linear; }
};

// The selected rows' logits, into the step's output. softcap 0: none.
class Head : public Op {
  public:
    std::shared_ptr<const PackedWeight> weight;
    std::vector<float> bias;
    int x, bytes;
    float softcap;
    void run(const Step&, Activations&, Team&) const override;
    OpKind kind() const override { return OpKind::linear; }
};

// Puts the selected rows side by side, multiplied by a number.
class Select : public Op {
  public:
    int x, out;
    float scale;
    void run(const Step&, Activations&, Team&) const override;
};

// Copies the selected rows into the step's output.
class Deliver : public Op {
  public:
    int x;
    void run(const Step&, Activations&, Team&) const override;
};

// How an attention layer reads its rows and the cache.
struct AttentionLayer {
    int64_t heads;
    CacheLayer<std::byte> cache;  // data: the layer's offset from the cache's first byte
    int64_t layer_offset;
    float softmax_scale;
    int64_t window;
    float softcap;
    std::vector<float> alibi_slopes, distance_bias;  // empty: none
    int64_t max_distance;

    ScoreOptions options() const;
};

// Turns queries and keys, if the model does, and writes keys and values into the cache. x holds keys from
// key_column on, values behind them; queries from column 0 on where there are any.
class Append : public Op {
  public:
    AttentionLayer layer;
    int x;
    int64_t key_column;
    int64_t rotated;  // elements of a head; 0: none
    void run(const Step&, Activations&, Team&) const override;
    OpKind kind() const override { return OpKind::attention; }
};

// Attention of queries over the cache: causal over the tokens' own sequences, or over their sources.
class Attend : public Op {
  public:
    AttentionLayer layer;
    int x, out;
    bool source;
    void run(const Step&, Activations&, Team&) const override;
    OpKind kind() const override { return OpKind::attention; }
};

// Attention within this step's sequences, without cache: an encoder's. x holds queries, keys and values side
// by side.
class AttendWithin : public Op {
  public:
    AttentionLayer layer;
    int x, out;
    bool causal;
    int64_t rotated;
    void run(const Step&, Activations&, Team&) const override;
    OpKind kind() const override { return OpKind::attention; }
};

}  // namespace tandem
