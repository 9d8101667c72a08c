// Scaled dot-product attention on the CPU, float32: padded, packed or over a paged cache, forward and
// backward.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace tandem {

// Row (b, t, h) begins at data + b * batch_stride + t * token_stride + h * head_stride. What is packed has no
// batch; of a cache, b is a block and t a place in it.
template <class T>
struct TokenRows {
    T* data;
    int64_t batch_stride, token_stride, head_stride;
};

// One float a query and head, (batch, heads, seqlen_q) or (heads, tokens); null data: not there.
template <class T>
struct HeadFloats {
    T* data;
    int64_t batch_stride, head_stride;
};

// What is done to a score; d is the key's position less the query's, which stands at key position
// i + seqlen_k - seqlen_q of its sequence.
struct ScoreOptions {
    int64_t window;              // only keys with |d| < window are seen; 0: no window
    float softcap;               // softcap * tanh(score / softcap); 0: as it is
    const float* alibi_slopes;   // (heads,): less slope * |d|; null: none
    const float* distance_bias;  // (heads, 2 * max_distance + 1): plus the number at d, clamped; null: none
    int64_t max_distance;
};

struct AttentionBatch {
    int64_t batch, heads, kv_heads, head_dim;
    TokenRows<const float> q, k, v;
    int64_t seqlen_q, seqlen_k;   // padded lengths
    const int32_t* cu_seqlens_q;  // packed queries; null: padded
    const int32_t* cu_seqlens_k;  // packed keys; null: padded or paged
    const int32_t* key_lengths;   // real keys of a padded or paged sequence; null: all
    const int32_t* block_table;   // null: not paged
    int64_t table_stride, block_size;
    bool causal;  // aligned bottom-right
    float softmax_scale;
    ScoreOptions options;
};

struct AttentionGradients {
    TokenRows<const float> out, grad_out;
    HeadFloats<const float> lse, grad_lse;
    TokenRows<float> grad_q, grad_k, grad_v;  // grad_k and grad_v of keys past a sequence's end are zeroed
    float* grad_distance_bias;                // as distance_bias; null: not wanted
};

// Lengths, offsets and block ids must be checked by the caller. head_dim is at most kMaxHeadDim. The result
// does not depend on the number of threads. To be called by every member of the team.
void attention_forward(const AttentionBatch& batch, const TokenRows<float>& out, const HeadFloats<float>& lse,
                       Team& team);

// Not for paged batches.
void attention_backward(const AttentionBatch& batch, const AttentionGradients& gradients, int num_threads);

}  // namespace tandem
