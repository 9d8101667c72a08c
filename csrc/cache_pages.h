// How the native cache lays out keys and values: in pages of sixteen tokens, so that the keys of a page are
// the lanes of one vector.
//
// A page holds, for each kv head in turn, a part of keys and a part of values:
//     keys    [width][16 tokens]   so that a query's element multiplies that element of sixteen keys at once
//     values  [16 tokens][width]   so that a weight multiplies a whole value
// each followed, for int8, by one float32 scale a token. width is head_dim rounded up to a whole vector; what
// lies in the elements behind head_dim is never used. A block of the engine's cache is block_size / 16 pages
// of every layer, the pages of a layer side by side.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tandem {

enum class CacheType { float32, bfloat16, int8 };  // int8: symmetric, scale = max |x| / 127 of a token's head

constexpr int64_t kPage = 16;  // tokens

constexpr int64_t size_of(CacheType type) {
    return type == CacheType::float32 ? 4 : type == CacheType::bfloat16 ? 2 : 1;
}

constexpr int64_t page_width(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Where the scales of an int8 part begin, or any part's elements end.
constexpr int64_t element_bytes(CacheType type, int64_t head_dim) {
    return kPage * page_width(head_dim) * size_of(type);
}

// The keys or the values of one head in one page. All sizes are multiples of 64 bytes.
constexpr int64_t part_bytes(CacheType type, int64_t head_dim) {
    const int64_t scales = type == CacheType::int8 ? kPage * static_cast<int64_t>(sizeof(float)) : 0;
    return element_bytes(type, head_dim) + scales;
}

constexpr int64_t page_bytes(CacheType type, int64_t kv_heads, int64_t head_dim) {
    return kv_heads * 2 * part_bytes(type, head_dim);
}

// One layer of the cache. The page of a block's tokens [16 i, 16 i + 16) begins at
// data + block * block_bytes + i * page_bytes(type, kv_heads, head_dim).
template <class Byte>
struct CacheLayer {
    Byte* data;  // on a boundary of 64 bytes, as block_bytes is a multiple of 64
    int64_t block_bytes, block_size;
    CacheType type;
    int64_t kv_heads, head_dim;

    int64_t pages_per_block() const { return block_size / kPage; }
    int64_t page_stride() const { return page_bytes(type, kv_heads, head_dim); }
    int64_t layer_bytes() const { return pages_per_block() * page_stride(); }

    // The keys of a kv head in a block's page; its values are part_bytes behind.
    Byte* keys(int64_t block, int64_t page, int64_t kv_head) const {
        return data + block * block_bytes + page * page_stride() + kv_head * 2 * part_bytes(type, head_dim);
    }
};

}  // namespace tandem
