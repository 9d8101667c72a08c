// Attention over the native cache of cache_pages.h, float32 queries, decoding and prefill alike.
//
// A row, one query in one head, gives the same bits whatever shares the call with it: its own keys fix the
// order of all its sums. So it does not matter whether a token is decoded or prefilled, in what batch, and on
// how many threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "cache_pages.h"
#include "cached_attention_kernels.h"
#include "parallel.h"

namespace tandem {

// New tokens' keys and values, and the queries that are rotated with them.
struct NewTokens {
    int64_t tokens, heads;
    HeadRows<const float> k, v;  // (tokens, kv_heads, head_dim)
    HeadRows<float> q;           // (tokens, heads, head_dim), rotated in place; null data: none
    const int64_t* slots;        // of each token: block * block_size + offset
    RowRotation rotation;        // of token 0; the others' angles follow, rotated / 2 apart. rotated 0: none
};

// Writes tokens into their slots, which must differ. To be called by every member of the team.
void append(const CacheLayer<std::byte>& cache, const NewTokens& tokens, Team& team);

struct CachedBatch {
    CacheLayer<const std::byte> cache;
    int64_t batch, heads;
    HeadRows<const float> q;       // (tokens, heads, head_dim)
    HeadRows<float> out;           // the same shape; may not overlap q
    const int32_t* cu_seqlens_q;   // (batch + 1,)
    const int32_t* cache_seqlens;  // (batch,) keys of a sequence, those of its queries included
    const int32_t* block_table;    // entries behind a sequence's last key are not read
    int64_t table_stride;
    bool causal;  // aligned bottom-right
    float softmax_scale;
    ScoreOptions options;
};

// What several threads' parts of a long sequence leave for one of them to join; kept between calls, it is
// allocated once.
using AttentionScratch = std::vector<float>;

// Lengths, offsets and block ids must be checked by the caller. head_dim is at most kMaxHeadDim. A query that
// sees no key gives zeros. To be called by every member of the team, with one scratch between them.
void attend(const CachedBatch& batch, AttentionScratch& scratch, Team& team);

}  // namespace tandem
