// The Python face of attention over the native cache: checks arrays, offsets and slots once a call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "bindings.h"
#include "bindings_attention.h"
#include "bindings_cache.h"
#include "cached_attention.h"

namespace py = pybind11;

namespace {

using namespace tandem;
using namespace tandem::bindings;

constexpr py::ssize_t kFloat = sizeof(float);

int64_t page_bytes(const std::string& type, int64_t kv_heads, int64_t head_dim) {
    check_format({type, kv_heads, head_dim, tandem::kPage});
    return tandem::page_bytes(cache_type(type), kv_heads, head_dim);
}

// uint8 (num_blocks, bytes of a layer): one layer's part of every block.
template <class Byte>
tandem::CacheLayer<Byte> layer_of(const py::array& array, const Format& format, Byte* data) {
    check_format(format);
    const tandem::CacheLayer<std::byte> plain = tandem::layer_format(format);
    tandem::CacheLayer<Byte> layer{nullptr, 0, plain.block_size, plain.type, plain.kv_heads, plain.head_dim};
    layer.data = data;
    const int64_t bytes = layer.layer_bytes();
    const bool fits = is<uint8_t>(array) && array.ndim() == 2 && array.shape(1) == bytes &&
                      array.strides(1) == 1 && array.strides(0) >= bytes && array.strides(0) % 64 == 0;
    if (!fits)
        refuse("cache",
               "uint8 (num_blocks, " + std::to_string(bytes) +
                   ") with contiguous rows that begin a multiple of 64 bytes apart",
               array);
    if (reinterpret_cast<uintptr_t>(data) % 64 != 0)
        throw py::value_error("cache must begin on a boundary of 64 bytes");
    layer.block_bytes = array.strides(0);
    return layer;
}

// (tokens, heads, head_dim), the last dimension contiguous.
template <class T>
HeadRows<T> rows_of(const py::array& array, const char* name, T* data) {
    const bool fits = is<float>(array) && array.ndim() == 3 &&
                      (array.shape(2) < 2 || array.size() == 0 || array.strides(2) == kFloat) &&
                      array.strides(0) % kFloat == 0 && array.strides(1) % kFloat == 0;
    if (!fits) refuse(name, "float32 (tokens, heads, head_dim) with the last dimension contiguous", array);
    return {data, array.strides(0) / kFloat, array.strides(1) / kFloat};
}

HeadRows<const float> read(const py::array& array, const char* name) {
    return rows_of(array, name, static_cast<const float*>(array.data()));
}

HeadRows<float> write(py::array& array, const char* name) {
    return rows_of(array, name, static_cast<float*>(array.mutable_data()));
}

void check_shape(const py::array& array, const char* name, int64_t tokens, int64_t heads, int64_t head_dim) {
    if (array.shape(0) == tokens && array.shape(1) == heads && array.shape(2) == head_dim) return;
    throw py::value_error(std::string(name) + " must have shape (" + std::to_string(tokens) + ", " +
                          std::to_string(heads) + ", " + std::to_string(head_dim) + "), got " +
                          shape_of(array));
}

const int64_t* slots_of(const py::array& slots, int64_t tokens, int64_t count) {
    const bool fits = is<int64_t>(slots) && slots.ndim() == 1 && slots.shape(0) == tokens &&
                      (tokens < 2 || slots.strides(0) == sizeof(int64_t));
    if (!fits) refuse("slots", "contiguous int64 of shape (" + std::to_string(tokens) + ",)", slots);
    const auto* data = static_cast<const int64_t*>(slots.data());
    for (int64_t t = 0; t < tokens; ++t)
        if (data[t] < 0 || data[t] >= count)
            throw py::value_error("slots must be between 0 and " + std::to_string(count - 1) + ", got " +
                                  std::to_string(data[t]) + " for token " + std::to_string(t));
    return data;
}

const float* angles_of(const py::array& array, const char* name, int64_t tokens, int64_t half) {
    const bool fits = array.ndim() == 2 && array.shape(0) == tokens && array.shape(1) == half &&
                      is<float>(array) && (array.flags() & py::array::c_style) != 0;
    if (!fits)
        refuse(name, "contiguous float32 (" + std::to_string(tokens) + ", " + std::to_string(half) + ")",
               array);
    return static_cast<const float*>(array.data());
}

// No rotation without cos and sin, which both must be (tokens, rotated / 2).
tandem::RowRotation rotation_of(const Optional& cos, const Optional& sin, bool interleaved, int64_t tokens,
                                int64_t head_dim) {
    if (!cos && !sin) return {};
    if (!cos || !sin) throw py::value_error("give both cos and sin, or neither");
    const int64_t half = cos->ndim() == 2 ? cos->shape(1) : 0;
    if (2 * half > head_dim)
        throw py::value_error("cos turns " + std::to_string(2 * half) + " elements, a head has " +
                              std::to_string(head_dim));
    return {2 * half, interleaved, angles_of(*cos, "cos", tokens, half),
            angles_of(*sin, "sin", tokens, half)};
}

void append(py::array& cache, const Format& format, const py::array& k, const py::array& v,
            const py::array& slots, const Optional& cos, const Optional& sin, bool interleaved, Optional& q,
            int num_threads) {
    check_threads(num_threads);
    const auto layer = layer_of(cache, format, static_cast<std::byte*>(cache.mutable_data()));
    tandem::NewTokens tokens{};
    tokens.k = read(k, "k");
    tokens.v = read(v, "v");
    tokens.tokens = k.shape(0);
    check_shape(k, "k", tokens.tokens, layer.kv_heads, layer.head_dim);
    check_shape(v, "v", tokens.tokens, layer.kv_heads, layer.head_dim);
    tokens.slots = slots_of(slots, tokens.tokens, cache.shape(0) * layer.block_size);
    tokens.rotation = rotation_of(cos, sin, interleaved, tokens.tokens, layer.head_dim);
    if (q) {
        tokens.q = write(*q, "q");
        tokens.heads = q->shape(1);
        check_shape(*q, "q", tokens.tokens, tokens.heads, layer.head_dim);
    }
    const py::gil_scoped_release release;
    tandem::run_team(num_threads, [&](tandem::Team& team) { tandem::append(layer, tokens, team); });
}

// The blocks that hold a sequence's keys must be in the cache; entries behind them may be anything.
void check_blocks(const tandem::CachedBatch& batch, int64_t num_blocks) {
    for (int64_t b = 0; b < batch.batch; ++b)
        for (int64_t i = 0; i * batch.cache.block_size < batch.cache_seqlens[b]; ++i) {
            const int32_t block = batch.block_table[b * batch.table_stride + i];
            if (block < 0 || block >= num_blocks)
                throw py::value_error("block_table names block " + std::to_string(block) + " of sequence " +
                                      std::to_string(b) + ", the cache has " + std::to_string(num_blocks));
        }
}

tandem::CachedBatch batch_of(const py::array& q, const py::array& cache, const Format& format,
                             const py::array& block_table, const py::array& cache_seqlens,
                             const py::array& cu_seqlens_q, bool causal, float softmax_scale,
                             const Scores& scores) {
    constexpr py::ssize_t size = sizeof(int32_t);
    tandem::CachedBatch batch{};
    batch.cache = layer_of(cache, format, static_cast<const std::byte*>(cache.data()));
    batch.q = read(q, "q");
    batch.heads = q.shape(1);
    check_shape(q, "q", q.shape(0), batch.heads, batch.cache.head_dim);
    if (batch.heads % batch.cache.kv_heads != 0)
        throw py::value_error(std::to_string(batch.cache.kv_heads) + " kv heads do not divide " +
                              std::to_string(batch.heads) + " heads");
    if (!is<int32_t>(block_table) || block_table.ndim() != 2 ||
        (block_table.shape(1) > 1 && block_table.strides(1) != size) || block_table.strides(0) % size != 0)
        refuse("block_table", "int32 (batch, max_blocks) with contiguous rows", block_table);
    batch.batch = block_table.shape(0);
    batch.block_table = static_cast<const int32_t*>(block_table.data());
    batch.table_stride = block_table.strides(0) / size;
    batch.cu_seqlens_q = integers(cu_seqlens_q, "cu_seqlens_q", batch.batch + 1);
    batch.cache_seqlens = integers(cache_seqlens, "cache_seqlens", batch.batch);
    batch.causal = causal;
    batch.softmax_scale = softmax_scale;
    batch.options = options_of(scores, batch.heads);
    check_offsets(batch.cu_seqlens_q, "cu_seqlens_q", batch.batch, q.shape(0));
    check_lengths(batch.cache_seqlens, "cache_seqlens", batch.batch,
                  block_table.shape(1) * batch.cache.block_size);
    check_blocks(batch, cache.shape(0));
    return batch;
}

void attend(const py::array& q, const py::array& cache, const Format& format, const py::array& block_table,
            const py::array& cache_seqlens, const py::array& cu_seqlens_q, bool causal, float softmax_scale,
            const Scores& scores, py::array& out, int num_threads) {
    check_threads(num_threads);
    tandem::CachedBatch batch =
        batch_of(q, cache, format, block_table, cache_seqlens, cu_seqlens_q, causal, softmax_scale, scores);
    check_same_shape(out, "out", q);
    batch.out = write(out, "out");
    check_apart(out, "out", q, "q");
    check_apart(out, "out", cache, "cache");
    thread_local tandem::AttentionScratch scratch;
    tandem::AttentionScratch& shared = scratch;  // this thread's, for all of the team
    const py::gil_scoped_release release;
    tandem::run_team(num_threads, [&](tandem::Team& team) { tandem::attend(batch, shared, team); });
}

}  // namespace

void tandem::register_cached_attention(py::module_& module) {
    module.attr("cache_page") = kPage;
    module.def("cache_page_bytes", &::page_bytes);
    module.def("cache_append", &::append);
    module.def("cached_attention", &::attend);
}
