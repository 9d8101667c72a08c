// Attention's Python face: checks arrays and offsets once a call, then hands pointers and strides on.
#include "bindings_attention.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>

#include "attention.h"
#include "attention_kernels.h"
#include "bindings.h"

namespace py = pybind11;

namespace {

using namespace tandem;
using namespace tandem::bindings;

// (batch, tokens, heads, head_dim), or (tokens, heads, head_dim) with a batch stride of 0.
template <class T>
TokenRows<T> rows_of(const py::array& array, const char* name, py::ssize_t rank, T* data) {
    constexpr py::ssize_t size = sizeof(float);
    bool fits = is<float>(array) && array.ndim() == rank;
    fits = fits && (array.shape(rank - 1) < 2 || array.size() == 0 || array.strides(rank - 1) == size);
    for (py::ssize_t i = 0; fits && i < rank - 1; ++i) fits = array.strides(i) % size == 0;
    if (!fits)
        refuse(name, "float32 with " + std::to_string(rank) + " dimensions, the last contiguous", array);
    return {data, rank == 4 ? array.strides(0) / size : 0, array.strides(rank - 3) / size,
            array.strides(rank - 2) / size};
}

TokenRows<const float> read(const py::array& array, const char* name, py::ssize_t rank) {
    return rows_of(array, name, rank, static_cast<const float*>(array.data()));
}

TokenRows<float> write(py::array& array, const char* name, py::ssize_t rank) {
    return rows_of(array, name, rank, static_cast<float*>(array.mutable_data()));
}

// (batch, heads, seqlen_q) or (heads, tokens), contiguous.
template <class T>
HeadFloats<T> floats_of(const py::array& array, const char* name, const AttentionBatch& batch, T* data) {
    const bool packed = batch.cu_seqlens_q != nullptr;
    const py::ssize_t rank = packed ? 2 : 3;
    const int64_t queries = packed ? batch.cu_seqlens_q[batch.batch] : batch.seqlen_q;
    const bool fits = is<float>(array) && array.ndim() == rank && array.shape(rank - 2) == batch.heads &&
                      array.shape(rank - 1) == queries && (packed || array.shape(0) == batch.batch) &&
                      (array.flags() & py::array::c_style) != 0;
    if (!fits) refuse(name, "contiguous float32, one number a head and query", array);
    return {data, packed ? 0 : batch.heads * queries, queries};
}

void check_heads(const AttentionBatch& batch, const py::array& k, const py::array& v) {
    const py::ssize_t rank = k.ndim();
    check_same_shape(v, "v", k);
    if (k.shape(rank - 1) != batch.head_dim || batch.head_dim < 1 || batch.head_dim > tandem::kMaxHeadDim)
        throw py::value_error("head_dim must be one for q, k and v, and between 1 and " +
                              std::to_string(tandem::kMaxHeadDim));
    if (batch.kv_heads < 1 || batch.heads % batch.kv_heads != 0)
        throw py::value_error(std::to_string(batch.kv_heads) + " kv heads do not divide " +
                              std::to_string(batch.heads) + " heads");
}

// q, k and v, padded or, with offsets, packed.
AttentionBatch batch_of(const py::array& q, const py::array& k, const py::array& v,
                        const Optional& cu_seqlens_q, const Optional& cu_seqlens_k,
                        const Optional& key_lengths, bool causal, float scale, const Scores& scores) {
    const bool packed = cu_seqlens_q.has_value();
    const py::ssize_t rank = packed ? 3 : 4;
    if (packed != cu_seqlens_k.has_value() || (packed && key_lengths))
        throw py::value_error(
            "give cu_seqlens_q and cu_seqlens_k for a packed batch, key_lengths for a padded one");
    AttentionBatch batch{};
    batch.q = read(q, "q", rank);
    batch.k = read(k, "k", rank);
    batch.v = read(v, "v", rank);
    batch.batch = packed ? cu_seqlens_q->size() - 1 : q.shape(0);
    batch.heads = q.shape(rank - 2);
    batch.kv_heads = k.shape(rank - 2);
    batch.head_dim = q.shape(rank - 1);
    batch.seqlen_q = q.shape(rank - 3);
    batch.seqlen_k = k.shape(rank - 3);
    batch.causal = causal;
    batch.softmax_scale = scale;
    check_heads(batch, k, v);
    batch.options = options_of(scores, batch.heads);
    batch.cu_seqlens_q = integers(cu_seqlens_q, "cu_seqlens_q", batch.batch + 1);
    batch.cu_seqlens_k = integers(cu_seqlens_k, "cu_seqlens_k", batch.batch + 1);
    batch.key_lengths = integers(key_lengths, "key_lengths", batch.batch);
    if (packed) {
        if (batch.batch < 0) throw py::value_error("cu_seqlens_q must hold at least one number");
        check_offsets(batch.cu_seqlens_q, "cu_seqlens_q", batch.batch, batch.seqlen_q);
        check_offsets(batch.cu_seqlens_k, "cu_seqlens_k", batch.batch, batch.seqlen_k);
    } else if (k.shape(0) != batch.batch) {
        throw py::value_error("q holds " + std::to_string(batch.batch) + " sequences and k " +
                              std::to_string(k.shape(0)));
    }
    if (batch.key_lengths != nullptr)
        check_lengths(batch.key_lengths, "key_lengths", batch.batch, batch.seqlen_k);
    return batch;
}

void forward(const py::array& q, const py::array& k, const py::array& v, const Optional& cu_seqlens_q,
             const Optional& cu_seqlens_k, const Optional& key_lengths, bool causal, float softmax_scale,
             const Scores& scores, py::array& out, std::optional<py::array>& lse, int num_threads) {
    check_threads(num_threads);
    const AttentionBatch batch =
        batch_of(q, k, v, cu_seqlens_q, cu_seqlens_k, key_lengths, causal, softmax_scale, scores);
    check_same_shape(out, "out", q);
    const TokenRows<float> result = write(out, "out", q.ndim());
    HeadFloats<float> log_sums{};
    if (lse) log_sums = floats_of(*lse, "lse", batch, static_cast<float*>(lse->mutable_data()));
    const py::gil_scoped_release release;
    tandem::run_team(num_threads,
                     [&](tandem::Team& team) { attention_forward(batch, result, log_sums, team); });
}

float* write_bias(Optional& gradient, const Scores& scores) {
    if (!gradient) return nullptr;
    const Optional& bias = std::get<3>(scores);
    if (!bias) throw py::value_error("grad_distance_bias needs distance_bias");
    check_same_shape(*gradient, "grad_distance_bias", *bias);
    run_of(gradient, "grad_distance_bias", bias->size());
    return static_cast<float*>(gradient->mutable_data());
}

void backward(const py::array& q, const py::array& k, const py::array& v, const Optional& cu_seqlens_q,
              const Optional& cu_seqlens_k, const Optional& key_lengths, bool causal, float softmax_scale,
              const Scores& scores, const py::array& out, const py::array& lse, const py::array& grad_out,
              const Optional& grad_lse, py::array& grad_q, py::array& grad_k, py::array& grad_v,
              std::optional<py::array>& grad_distance_bias, int num_threads) {
    check_threads(num_threads);
    const AttentionBatch batch =
        batch_of(q, k, v, cu_seqlens_q, cu_seqlens_k, key_lengths, causal, softmax_scale, scores);
    const auto floats = [&](const py::array& array, const char* name) {
        return floats_of(array, name, batch, static_cast<const float*>(array.data()));
    };
    const py::ssize_t rank = q.ndim();
    check_same_shape(out, "out", q);
    check_same_shape(grad_out, "grad_out", q);
    check_same_shape(grad_q, "grad_q", q);
    check_same_shape(grad_k, "grad_k", k);
    check_same_shape(grad_v, "grad_v", v);
    const tandem::AttentionGradients gradients = {
        read(out, "out", rank),
        read(grad_out, "grad_out", rank),
        floats(lse, "lse"),
        grad_lse ? floats(*grad_lse, "grad_lse") : HeadFloats<const float>{},
        write(grad_q, "grad_q", rank),
        write(grad_k, "grad_k", rank),
        write(grad_v, "grad_v", rank),
        write_bias(grad_distance_bias, scores)};
    const py::gil_scoped_release release;
    tandem::attention_backward(batch, gradients, num_threads);
}

// The blocks that hold a sequence's keys must be in the cache; entries behind them may be anything.
void check_blocks(const AttentionBatch& batch, int64_t num_blocks) {
    for (int64_t b = 0; b < batch.batch; ++b)
        for (int64_t i = 0; i * batch.block_size < batch.key_lengths[b]; ++i) {
            const int32_t block = batch.block_table[b * batch.table_stride + i];
            if (block < 0 || block >= num_blocks)
                throw py::value_error("block_table names block " + std::to_string(block) + " of sequence " +
                                      std::to_string(b) + ", the cache has " + std::to_string(num_blocks));
        }
}

AttentionBatch paged_batch_of(const py::array& q, const py::array& k_cache, const py::array& v_cache,
                              const py::array& block_table, const Optional& cache_seqlens,
                              const Optional& cu_seqlens_q, bool causal, float softmax_scale,
                              const Scores& scores) {
    AttentionBatch batch{};
    batch.q = read(q, "q", 3);
    batch.k = read(k_cache, "k_cache", 4);
    batch.v = read(v_cache, "v_cache", 4);
    if (!is<int32_t>(block_table) || block_table.ndim() != 2 ||
        (block_table.shape(1) > 1 && block_table.strides(1) != sizeof(int32_t)))
        refuse("block_table", "int32 (batch, max_blocks) with contiguous rows", block_table);
    batch.batch = block_table.shape(0);
    batch.heads = q.shape(1);
    batch.kv_heads = k_cache.shape(2);
    batch.head_dim = q.shape(2);
    batch.seqlen_q = q.shape(0);
    batch.block_size = k_cache.shape(1);
    batch.causal = causal;
    batch.softmax_scale = softmax_scale;
    check_heads(batch, k_cache, v_cache);
    batch.options = options_of(scores, batch.heads);
    batch.cu_seqlens_q = integers(cu_seqlens_q, "cu_seqlens_q", batch.batch + 1);
    batch.key_lengths = integers(cache_seqlens, "cache_seqlens", batch.batch);
    batch.block_table = static_cast<const int32_t*>(block_table.data());
    batch.table_stride = block_table.strides(0) / static_cast<py::ssize_t>(sizeof(int32_t));
    check_offsets(batch.cu_seqlens_q, "cu_seqlens_q", batch.batch, batch.seqlen_q);
    check_lengths(batch.key_lengths, "cache_seqlens", batch.batch, block_table.shape(1) * batch.block_size);
    check_blocks(batch, k_cache.shape(0));
    return batch;
}

void paged(const py::array& q, const py::array& k_cache, const py::array& v_cache,
           const py::array& block_table, const Optional& cache_seqlens, const Optional& cu_seqlens_q,
           bool causal, float softmax_scale, const Scores& scores, py::array& out, int num_threads) {
    check_threads(num_threads);
    const AttentionBatch batch = paged_batch_of(q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q,
                                                causal, softmax_scale, scores);
    check_same_shape(out, "out", q);
    const TokenRows<float> result = write(out, "out", 3);
    const py::gil_scoped_release release;
    tandem::run_team(num_threads, [&](tandem::Team& team) { attention_forward(batch, result, {}, team); });
}

}  // namespace

void tandem::register_attention(py::module_& module) {
    module.attr("max_head_dim") = kMaxHeadDim;
    module.def("attention_forward", &forward);
    module.def("attention_backward", &backward);
    module.def("paged_attention", &paged);
}
