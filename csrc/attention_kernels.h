// Attention over one kv head of one sequence, forward and backward: one implementation a CPU path.
//
// All query heads that read a kv head are handled together. Row r of the head is query r / groups in query
// head r % groups of the group, so `groups` heads of one query fill a vector where there is but one query.
// Each row's arithmetic is its own, in an order fixed by its keys alone: it gives the same bits whatever
// shares the batch, the block or the cache with it.
#pragma once

#include <cstdint>

namespace tandem {

constexpr int64_t kRowBlock = 32;  // rows handled together, the lanes of the vectors
constexpr int64_t kKeyBlock = 64;  // keys whose scores are held at a time
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kFar = int64_t{1} << 40;  // further than any two tokens

// Row r of a head begins at data + (r / groups) * token_stride + (r % groups) * head_stride.
template <class T>
struct HeadRows {
    T* data;
    int64_t token_stride, head_stride;
};

// The keys, or the values, of a kv head: `stride` floats from one to the next, in one run or in blocks.
struct KeyRows {
    const float* data;
    int64_t stride;
    int64_t block_stride;
};

// What is added to the scores of a group's query heads, by the distance d from query to key: a number of each
// head's row, d clamped to [-reach, reach], less slope * |d|. Null pointers: nothing.
struct DistanceBias {
    const float* rows;  // (groups, 2 * reach + 1)
    int64_t reach;
    const float* slopes;  // (groups,)
};

struct AttentionHead {
    HeadRows<const float> q;
    KeyRows k, v;
    const int32_t* blocks;  // key j is row j % block_size of block blocks[j / block_size]; null: one run
    int64_t block_size;
    int64_t groups, queries, keys, head_dim;
    int64_t diagonal;       // query i stands at p = i + diagonal among the keys
    int64_t behind, ahead;  // and sees those from p - behind to p + ahead
    float softmax_scale;
    float softcap;  // 0: none
    DistanceBias bias;
    HeadRows<float> out;
    HeadRows<float> lse;  // one float a row, null data: not wanted
};

// What the backward pass reads besides the head itself (keys in one run), and what it writes.
struct HeadGradients {
    HeadRows<const float> out, grad_out;
    HeadRows<const float> lse, grad_lse;  // grad_lse: null data for none
    HeadRows<float> grad_q;
    float *grad_k, *grad_v;
    int64_t grad_k_stride, grad_v_stride;
    double* grad_bias;  // as bias.rows, added to; null: not wanted
};

struct AttentionKernels {
    // Rows first_row to first_row + kRowBlock - 1 of the head, or as many as there are.
    void (*forward)(const AttentionHead& head, int64_t first_row, float* scratch);
    // The gradients of a whole head. Rows' contributions to a key are added in order.
    void (*backward)(const AttentionHead& head, const HeadGradients& gradients, float* scratch);
};

// Head_dim rounded up so that a padded row is whole vectors on any path.
constexpr int64_t padded(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// The biases that a block of scores meets: those of some distances, the heads of a group side by side.
constexpr int64_t strip_floats(int64_t groups) { return (kKeyBlock + 1) * groups + kRowBlock; }

// Floats of scratch memory, aligned to 64 bytes, that a call needs.
constexpr int64_t forward_scratch(int64_t head_dim, int64_t groups) {
    return (3 * kRowBlock + 2 * kKeyBlock) * padded(head_dim) + kKeyBlock * kRowBlock + strip_floats(groups);
}
constexpr int64_t backward_scratch(int64_t head_dim, int64_t groups, int64_t keys) {
    return (5 * kRowBlock + 3 * keys) * padded(head_dim) + 3 * kKeyBlock * kRowBlock + strip_floats(groups);
}

extern const AttentionKernels kGenericAttentionKernels;
#if defined(__x86_64__)
extern const AttentionKernels kAvx2AttentionKernels;
extern const AttentionKernels kAvx512AttentionKernels;
#endif

// The kernels of cpu_path().
const AttentionKernels& attention_kernels();

}  // namespace tandem
