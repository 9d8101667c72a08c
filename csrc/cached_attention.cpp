#include "cached_attention.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cached_attention_kernels.h"

namespace tandem {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

RowRotation rotation_of(const NewTokens& tokens, int64_t t) {
    RowRotation rotation = tokens.rotation;
    rotation.cos += t * (rotation.rotated / 2);
    rotation.sin += t * (rotation.rotated / 2);
    return rotation;
}

void append_token(const CacheLayer<std::byte>& cache, const NewTokens& tokens, int64_t t, int64_t kv_head) {
    const CachedAttentionKernels& kernels = cached_attention_kernels();
    const int64_t block = tokens.slots[t] / cache.block_size, offset = tokens.slots[t] % cache.block_size;
    std::byte* keys = cache.keys(block, offset / kPage, kv_head);
    std::byte* values = keys + part_bytes(cache.type, cache.head_dim);
    const float* key = tokens.k.data + t * tokens.k.token_stride + kv_head * tokens.k.head_stride;
    const float* value = tokens.v.data + t * tokens.v.token_stride + kv_head * tokens.v.head_stride;
    float rotated[kMaxHeadDim];
    if (tokens.rotation.rotated > 0) {
        kernels.rotate(key, cache.head_dim, rotation_of(tokens, t), rotated);
        key = rotated;
    }
    kernels.append_key(cache.type, key, cache.head_dim, offset % kPage, keys);
    kernels.append_value(cache.type, value, cache.head_dim, offset % kPage, values);
}

void rotate_query(const NewTokens& tokens, int64_t t, int64_t head_dim) {
    for (int64_t head = 0; head < tokens.heads; ++head) {
        float* row = tokens.q.data + t * tokens.q.token_stride + head * tokens.q.head_stride;
        cached_attention_kernels().rotate(row, head_dim, rotation_of(tokens, t), row);
    }
}

int64_t groups_of(const CachedBatch& batch) { return batch.heads / batch.cache.kv_heads; }

// One kv head of sequence b and its queries.
CachedHead head_of(const CachedBatch& batch, int64_t b, int64_t kv_head) {
    const int64_t groups = groups_of(batch), first = kv_head * groups;
    const ScoreOptions& options = batch.options;
    CachedHead head{};
    head.cache = batch.cache;
    head.kv_head = kv_head;
    head.blocks = batch.block_table + b * batch.table_stride;
    head.groups = groups;
    head.queries = batch.cu_seqlens_q[b + 1] - batch.cu_seqlens_q[b];
    head.keys = batch.cache_seqlens[b];
    head.diagonal = head.keys - head.queries;
    head.behind = options.window > 0 ? std::min(options.window - 1, kFar) : kFar;
    head.ahead = batch.causal ? 0 : head.behind;
    head.softmax_scale = batch.softmax_scale;
    head.softcap = options.softcap;
    head.bias.reach = options.max_distance;
    if (options.distance_bias != nullptr)
        head.bias.rows = options.distance_bias + first * (2 * options.max_distance + 1);
    if (options.alibi_slopes != nullptr) head.bias.slopes = options.alibi_slopes + first;
    const int64_t token = batch.cu_seqlens_q[b];
    head.q = batch.q;
    head.q.data += token * batch.q.token_stride + first * batch.q.head_stride;
    head.out = batch.out;
    head.out.data += token * batch.out.token_stride + first * batch.out.head_stride;
    return head;
}

// What a sequence adds to the work. Its tiles are numbered head by head, its tasks tile by tile.
struct Share {
    int64_t head_tiles, tiles;  // of one kv head, of all
    int64_t pieces;             // tasks of a tile: one, or one for each segment of its keys
    int64_t first_task;
    int64_t first_split;  // of the tiles cut into several pieces, numbered apart
};

// One kv head of a sequence, and the tile of its rows that begins at first_row.
struct Place {
    int64_t b, kv_head, first_row;
};

// How the work is shared out: a tile of a sequence's rows is a task. Where one would keep a thread busy while
// the others wait, as with a long sequence decoded alone, each segment of its keys is.
class Plan {
  public:
    Plan(const CachedBatch& batch, int threads) : shares_(memory()) {
        shares_.clear();
        int64_t work = 0;  // segments of tiles
        for (int64_t b = 0; b < batch.batch; ++b) {
            const int64_t rows = (batch.cu_seqlens_q[b + 1] - batch.cu_seqlens_q[b]) * groups_of(batch);
            const int64_t head_tiles = ceil_div(rows, tile_rows()), tiles = head_tiles * batch.cache.kv_heads;
            shares_.push_back({head_tiles, tiles, most_segments(batch, b), 0, 0});
            work += tiles * shares_.back().pieces;
        }
        const int64_t most = threads > 1 ? std::max<int64_t>(1, work / (4 * int64_t{threads})) : work;
        int64_t heaviest = 1;  // task
        for (Share& share : shares_) {
            share.first_task = tasks_;
            share.first_split = split_tiles_;
            if (share.pieces > most) {
                split_tiles_ += share.tiles;
                most_pieces_ = std::max(most_pieces_, share.pieces);
            } else {
                heaviest = std::max(heaviest, share.pieces);
                share.pieces = 1;
            }
            tasks_ += share.tiles * share.pieces;
        }
        run_ = std::max<int64_t>(1, work / (8 * int64_t{threads}) / heaviest);
    }

    // Tasks that a thread takes at a time, neighbours, for they read neighbouring memory.
    int64_t run() const { return run_; }
    int64_t tasks() const { return tasks_; }
    int64_t split_tiles() const { return split_tiles_; }

    // Partials that the split tiles need, and where those of a tile begin.
    int64_t partials() const { return first_partial(split_tiles_); }
    int64_t first_partial(int64_t split_tile) const { return split_tile * most_pieces_; }

    const Share& share_of_task(int64_t task) const { return last_from(task, &Share::first_task); }
    const Share& share_of_split(int64_t split_tile) const {
        return last_from(split_tile, &Share::first_split);
    }

    Place place_of(const Share& share, int64_t tile) const {
        return {&share - shares_.data(), tile / share.head_tiles, tile % share.head_tiles * tile_rows()};
    }

  private:
    static int64_t tile_rows() { return cached_attention_kernels().tile_rows; }

    // No tile of the sequence sees keys of more segments.
    static int64_t most_segments(const CachedBatch& batch, int64_t b) {
        const int64_t all = ceil_div(batch.cache_seqlens[b], kSegment), window = batch.options.window;
        if (window == 0 || window > all * kSegment) return all;
        return std::min(all, (2 * window + kMostTileRows) / kSegment + 2);
    }

    // Each thread's own, kept between calls.
    static std::vector<Share>& memory() {
        thread_local std::vector<Share> shares;
        return shares;
    }

    const Share& last_from(int64_t index, int64_t Share::* first) const {
        const auto after = std::upper_bound(shares_.begin(), shares_.end(), index,
                                            [&](int64_t i, const Share& share) { return i < share.*first; });
        return *(after - 1);
    }

    std::vector<Share>& shares_;
    int64_t tasks_ = 0, split_tiles_ = 0, most_pieces_ = 0, run_ = 1;
};

// The segments that hold the keys which a tile's rows see; equal ends where they see none.
KeyRange segments_of(const CachedHead& head, int64_t first_row) {
    const int64_t last_row =
        std::min(first_row + cached_attention_kernels().tile_rows, head.queries * head.groups) - 1;
    const KeyRange keys = {head.seen_by(first_row).begin, head.seen_by(last_row).end};
    if (keys.end <= keys.begin) return {0, 0};
    return {keys.begin / kSegment, ceil_div(keys.end, kSegment)};
}

// On a boundary of 64 bytes.
float* aligned(AttentionScratch& scratch) {
    const auto address = reinterpret_cast<uintptr_t>(scratch.data());
    return scratch.data() + (64 - address % 64) % 64 / sizeof(float);
}

void attend_tile(const CachedBatch& batch, const Place& place) {
    alignas(64) float partial[kPartialFloats];
    const CachedHead head = head_of(batch, place.b, place.kv_head);
    const KeyRange segments = segments_of(head, place.first_row);
    const CachedAttentionKernels& kernels = cached_attention_kernels();
    if (segments.begin < segments.end)
        kernels.attend(head, place.first_row, segments.begin, segments.end, partial);
    kernels.write(head, place.first_row, partial, segments.begin < segments.end ? 1 : 0);
}

void attend_piece(const CachedBatch& batch, const Place& place, int64_t piece, float* partials) {
    const CachedHead head = head_of(batch, place.b, place.kv_head);
    const KeyRange segments = segments_of(head, place.first_row);
    const int64_t index = segments.begin + piece;
    if (index >= segments.end) return;
    cached_attention_kernels().attend(head, place.first_row, index, index + 1,
                                      partials + piece * kPartialFloats);
}

void join_tile(const CachedBatch& batch, const Place& place, float* partials) {
    const CachedHead head = head_of(batch, place.b, place.kv_head);
    const KeyRange segments = segments_of(head, place.first_row);
    cached_attention_kernels().write(head, place.first_row, partials, segments.end - segments.begin);
}

}  // namespace

void append(const CacheLayer<std::byte>& cache, const NewTokens& tokens, Team& team) {
    // A head at a time of the tokens of a page: their lanes lie in the same cache lines.
    const int64_t run = std::clamp<int64_t>(ceil_div(tokens.tokens, 4 * int64_t{team.size()}), 1, kPage);
    team.for_each(ceil_div(tokens.tokens, run), [&](int64_t i) {
        const int64_t begin = i * run, end = std::min(tokens.tokens, begin + run);
        for (int64_t kv_head = 0; kv_head < cache.kv_heads; ++kv_head)
            for (int64_t t = begin; t < end; ++t) append_token(cache, tokens, t, kv_head);
        if (tokens.rotation.rotated == 0 || tokens.q.data == nullptr) return;
        for (int64_t t = begin; t < end; ++t) rotate_query(tokens, t, cache.head_dim);
    });
}

void attend(const CachedBatch& batch, AttentionScratch& scratch, Team& team) {
    const Plan plan(batch, team.size());
    const auto needed = static_cast<size_t>(plan.partials() * kPartialFloats + kPage);
    if (plan.split_tiles() > 0) {
        team.once([&] {
            if (scratch.size() < needed) scratch.resize(needed);
        });
        if (scratch.size() < needed) return;  // there was no memory, which the team reports
    }
    const auto partials_of = [&](int64_t split_tile) {
        return aligned(scratch) + plan.first_partial(split_tile) * kPartialFloats;
    };
    const auto run_task = [&](int64_t task) {
        const Share& share = plan.share_of_task(task);
        const int64_t tile = (task - share.first_task) / share.pieces;
        const Place place = plan.place_of(share, tile);
        if (share.pieces == 1) return attend_tile(batch, place);
        attend_piece(batch, place, (task - share.first_task) % share.pieces,
                     partials_of(share.first_split + tile));
    };
    team.for_each(ceil_div(plan.tasks(), plan.run()), [&](int64_t i) {
        const int64_t end = std::min(plan.tasks(), (i + 1) * plan.run());
        for (int64_t task = i * plan.run(); task < end; ++task) run_task(task);
    });
    if (plan.split_tiles() == 0) return;
    team.for_each(plan.split_tiles(), [&](int64_t split_tile) {
        const Share& share = plan.share_of_split(split_tile);
        join_tile(batch, plan.place_of(share, split_tile - share.first_split), partials_of(split_tile));
    });
}

}  // namespace tandem
