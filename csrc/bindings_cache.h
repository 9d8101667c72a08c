// What the bindings that see the native cache share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>
#include <tuple>

#include "bindings_attention.h"
#include "cache_pages.h"
#include "cached_attention.h"

namespace tandem {

using bindings::Scores;

// Far beyond any model's; the sizes of a cache, counted in bytes, fit sixty-four bits below them.
constexpr int64_t kMostHeads = 1 << 16, kMostTokens = 1 << 20;

// dtype, kv_heads, head_dim, block_size
using Format = std::tuple<std::string, int64_t, int64_t, int64_t>;

inline CacheType cache_type(const std::string& name) {
    if (name == "float32") return CacheType::float32;
    if (name == "bfloat16") return CacheType::bfloat16;
    if (name == "int8") return CacheType::int8;
    throw pybind11::value_error("a cache holds float32, bfloat16 or int8, not " + name);
}

inline void check_format(const Format& format) {
    const auto& [type, kv_heads, head_dim, block_size] = format;
    if (kv_heads < 1 || kv_heads > kMostHeads)
        throw pybind11::value_error("kv_heads must be between 1 and " + std::to_string(kMostHeads) +
                                    ", got " + std::to_string(kv_heads));
    if (head_dim < 1 || head_dim > kMaxHeadDim)
        throw pybind11::value_error("head_dim must be between 1 and " + std::to_string(kMaxHeadDim) +
                                    ", got " + std::to_string(head_dim));
    if (block_size < 1 || block_size > kMostTokens || block_size % kPage != 0)
        throw pybind11::value_error("block_size must be a multiple of " + std::to_string(kPage) + " up to " +
                                    std::to_string(kMostTokens) + ", got " + std::to_string(block_size));
}

// A layer of a checked format, of no memory yet.
inline CacheLayer<std::byte> layer_format(const Format& format) {
    const auto& [type, kv_heads, head_dim, block_size] = format;
    return {nullptr, 0, block_size, cache_type(type), kv_heads, head_dim};
}

}  // namespace tandem
