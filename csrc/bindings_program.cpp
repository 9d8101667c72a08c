// The Python face of programs: puts a list of operations together, and runs it on a step's arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bindings_cache.h"
#include "bindings_checks.h"
#include "bindings_linear.h"
#include "program_ops.h"

namespace py = pybind11;
using namespace tandem;

namespace {

using Optional = std::optional<py::array>;
using Weight = std::shared_ptr<const PackedWeight>;

std::vector<float> numbers_of(const Optional& array, const char* name, py::ssize_t size) {
    if (!array) return {};
    require_run<float>(*array, name, size, "float32");
    const auto* data = static_cast<const float*>(array->data());
    return {data, data + size};
}

// A bias in the order of packed outputs, padded to whole chunks.
std::vector<float> bias_of(const Optional& array, const PackedMatrix& matrix) {
    std::vector<float> bias = numbers_of(array, "bias", matrix.outputs);
    if (array) bias.resize(static_cast<size_t>(matrix.chunks() * kChunk));
    return bias;
}

class Builder {
  public:
    int floats(int64_t width) {
        check_unfinished();
        check_range("width", width, 1, kMostNumbers);
        return program_.activations.add_floats(width);
    }

    // Rows that `weight` takes in eight bits.
    int bytes(const PackedWeight& weight) {
        check_unfinished();
        const PackedMatrix& matrix = weight.matrix();
        if (matrix.storage < Storage::int8) throw py::value_error("weights of floats take rows of floats");
        const std::pair<int64_t, int64_t> layout = {byte_stride(matrix), byte_groups(matrix)};
        bytes_.push_back(layout);
        return program_.activations.add_bytes(layout.first, layout.second);
    }

    void embed(Weight tokens, float scale, const Optional& positions, int64_t offset, int out) {
        check_unfinished();
        auto op = std::make_unique<Embed>();
        const PackedMatrix& matrix = matrix_of(tokens);
        if (num_tokens_ != 0) throw py::value_error("a program embeds its tokens once");
        check_width("out", out, matrix.inputs);
        const py::ssize_t size = positions ? positions->size() : 0;
        op->positions = numbers_of(positions, "positions", size);
        if (positions) check_range("offset", offset, 0, size / matrix.inputs);
        num_positions_ = positions ? size / matrix.inputs - offset : -1;
        num_tokens_ = matrix.outputs;
        op->tokens = std::move(tokens);
        op->scale = scale;
        op->offset = offset;
        op->out = out;
        program_.add(std::move(op));
    }

    void rotary(const py::array& frequencies, float factor) {
        check_unfinished();
        auto op = std::make_unique<RotaryAngles>();
        op->frequencies = numbers_of(frequencies, "frequencies", frequencies.size());
        op->factor = factor;
        rotated_ = 2 * frequencies.size();
        program_.add(std::move(op));
    }

    void norm(int x, const py::array& weight, const Optional& bias, float eps, bool subtract_mean, int out,
              int64_t column, int64_t heads, int added, int bytes, bool selected) {
        check_unfinished();
        auto op = std::make_unique<Norm>();
        const py::ssize_t width = weight.size();
        check_range("heads", heads, 1, kMostHeads);
        check_range("column", column, 0, kMostNumbers);
        for (int id : {x, out})
            if (width == 0 || column + heads * width > program_.activations.width(check_floats("x", id)))
                throw py::value_error("a norm's weight is too wide for its rows");
        if ((bytes != kNone || added != kNone) && (column != 0 || heads != 1))
            throw py::value_error("only the norm of a whole row is rounded, or added to another");
        if (selected && (x == out || added != kNone))
            throw py::value_error("a norm of selected rows goes to other rows, and adds none");
        if (bytes != kNone) check_bytes(bytes, width, 0);
        if (added != kNone) check_width("added", added, width);
        op->weight = numbers_of(weight, "weight", width);
        op->bias = numbers_of(bias, "bias", width);
        op->eps = eps;
        op->subtract_mean = subtract_mean;
        op->x = x;
        op->out = out;
        op->column = column;
        op->heads = heads;
        op->added = added;
        op->bytes = bytes;
        op->group = group_of(bytes, width);
        op->selected = selected;
        program_.add(std::move(op));
    }

    void select(int x, int out, float scale) {
        check_unfinished();
        auto op = std::make_unique<Select>();
        check_width("out", out, program_.activations.width(check_floats("x", x)));
        if (x == out) throw py::value_error("out must be other rows than x");
        op->x = x;
        op->out = out;
        op->scale = scale;
        program_.add(std::move(op));
    }

    void quantize(int x, int bytes, bool selected) {
        check_unfinished();
        auto op = std::make_unique<Quantize>();
        const int64_t width = program_.activations.width(check_floats("x", x));
        check_bytes(bytes, width, 0);
        op->x = x;
        op->bytes = bytes;
        op->group = group_of(bytes, width);
        op->selected = selected;
        program_.add(std::move(op));
    }

    void linear(Weight weight, const Optional& bias, const std::string& activation, bool gated, int x,
                int bytes, int residual, int out) {
        check_unfinished();
        auto op = std::make_unique<LinearLayer>();
        const PackedMatrix& matrix = matrix_of(weight);
        check_inputs(matrix, x, bytes);
        if (x == out) throw py::value_error("out must be other rows than x");
        if (gated && matrix.outputs % kChunk != 0)
            throw py::value_error("a gated layer needs a multiple of 64 outputs");
        const int64_t width = gated ? matrix.outputs / 2 : matrix.outputs;
        check_width("out", out, width);
        if (residual != kNone) check_width("residual", residual, width);
        op->bias = bias_of(bias, matrix);
        op->weight = std::move(weight);
        op->activation = activation_named(activation);
        op->gated = gated;
        op->x = x;
        op->bytes = bytes;
        op->residual = residual;
        op->out = out;
        op->then = nullptr;
        reads_next(op->weight->matrix());
        last_linear_ = op.get();
        program_.add(std::move(op));
    }

    void head(Weight weight, const Optional& bias, int x, int bytes, float softcap) {
        check_unfinished();
        auto op = std::make_unique<Head>();
        const PackedMatrix& matrix = matrix_of(weight);
        check_inputs(matrix, x, bytes);
        op->bias = bias_of(bias, matrix);
        deliver_rows_of(matrix.outputs);
        op->weight = std::move(weight);
        reads_next(op->weight->matrix());
        last_linear_ = nullptr;
        op->x = x;
        op->bytes = bytes;
        op->softcap = softcap;
        program_.add(std::move(op));
    }

    void deliver(int x) {
        check_unfinished();
        auto op = std::make_unique<Deliver>();
        deliver_rows_of(program_.activations.width(check_floats("x", x)));
        op->x = x;
        program_.add(std::move(op));
    }

    // Of the attention layers that follow.
    void cache(const Format& format, int64_t layers) {
        check_unfinished();
        check_format(format);
        check_range("layers", layers, 1, kMostHeads);
        if (layers_ != 0) throw py::value_error("a program has one cache");
        layer_.cache = layer_format(format);
        layer_.cache.block_bytes = layers * layer_.cache.layer_bytes();
        layers_ = layers;
    }

    void append(int64_t layer, int64_t heads, int x, int64_t key_column, int64_t rotated) {
        check_unfinished();
        auto op = std::make_unique<Append>();
        op->layer = layer_of(layer, heads);
        const CacheLayer<std::byte>& cache = op->layer.cache;
        if (key_column != 0 && key_column != heads * cache.head_dim)
            throw py::value_error("keys begin at column 0, or behind the queries");
        check_width("x", x, key_column + 2 * cache.kv_heads * cache.head_dim);
        check_rotated(rotated, cache.head_dim);
        op->x = x;
        op->key_column = key_column;
        op->rotated = rotated;
        writes_cache_ = true;
        program_.add(std::move(op));
    }

    void attend(int64_t layer, int64_t heads, const Scores& scores, float softmax_scale, int x, int out,
                bool source) {
        check_unfinished();
        auto op = std::make_unique<Attend>();
        op->layer = layer_of(layer, heads);
        set_scores(op->layer, scores, softmax_scale);
        check_attended(op->layer, x, out, 1);
        op->x = x;
        op->out = out;
        op->source = source;
        (source ? reads_source_ : reads_own_) = true;
        program_.add(std::move(op));
    }

    void attend_within(int64_t heads, int64_t kv_heads, int64_t head_dim, const Scores& scores,
                       float softmax_scale, int x, int out, bool causal, int64_t rotated) {
        check_unfinished();
        auto op = std::make_unique<AttendWithin>();
        check_format({"float32", kv_heads, head_dim, kPage});
        op->layer.cache.kv_heads = kv_heads;
        op->layer.cache.head_dim = head_dim;
        op->layer.heads = heads;
        check_heads(heads, kv_heads);
        set_scores(op->layer, scores, softmax_scale);
        check_attended(op->layer, x, out, 3);
        check_rotated(rotated, head_dim);
        op->x = x;
        op->out = out;
        op->causal = causal;
        op->rotated = rotated;
        program_.add(std::move(op));
    }

    void run(const py::array& token_ids, const py::array& positions, const py::array& cu_seqlens,
             const Optional& slots, const Optional& lengths, const Optional& blocks,
             const Optional& source_lengths, const Optional& source_blocks, std::optional<py::array>& cache,
             const py::array& selected, py::array& out, int num_threads) {
        check_threads(num_threads);
        finished_ = true;
        Step step{};
        step.tokens = token_ids.size();
        step.token_ids = ids_of(token_ids, "token_ids", step.tokens, num_tokens_);
        step.positions = ids_of(positions, "positions", step.tokens, num_positions_);
        step.sequences = cu_seqlens.size() - 1;
        step.cu_seqlens = offsets_of(cu_seqlens, step);
        int64_t num_blocks = 0;
        if (writes_cache_ || reads_own_ || reads_source_) {
            if (!cache) throw py::value_error("the program needs a cache");
            num_blocks = cache_of(*cache, step);
        }
        if (writes_cache_) {
            if (!slots) throw py::value_error("the program needs slots");
            step.slots = ids_of(*slots, "slots", step.tokens, num_blocks * layer_.cache.block_size);
        }
        if (reads_own_) step.own = table_of(lengths, blocks, "", step, num_blocks);
        if (reads_source_) step.source = table_of(source_lengths, source_blocks, "source_", step, num_blocks);
        step.num_selected = selected.size();
        step.selected = ids_of(selected, "selected", step.num_selected, step.tokens);
        const bool fits = is<float>(out) && out.ndim() == 2 && out.shape(0) == step.num_selected &&
                          out.shape(1) == out_width_ && out.writeable() &&
                          (out.flags() & py::array::c_style) != 0;
        require(fits, "out",
                "contiguous float32 (" + std::to_string(step.num_selected) + ", " +
                    std::to_string(out_width_) + ")",
                out);
        step.out = static_cast<float*>(out.mutable_data());
        step.out_stride = out_width_;
        const Optional inputs[] = {token_ids, positions,      cu_seqlens,    slots,   lengths,
                                   blocks,    source_lengths, source_blocks, selected};
        for (const Optional& input : inputs) {
            if (!input) continue;
            check_apart(out, "out", *input, "what is read");
            if (cache) check_apart(*cache, "cache", *input, "what is read");
        }
        if (cache) check_apart(out, "out", *cache, "cache");
        const py::gil_scoped_release release;
        program_.run(step, num_threads);
    }

    std::array<double, 3> take_seconds() { return program_.take_seconds(); }
    int64_t nbytes() const { return program_.activations.nbytes(); }

  private:
    // Beyond any model's rows; so many rows of them, counted in bytes, fit sixty-four bits.
    static constexpr int64_t kMostNumbers = int64_t{1} << 31;

    static void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
        if (value < least || value > most)
            throw py::value_error(std::string(name) + " must be between " + std::to_string(least) + " and " +
                                  std::to_string(most) + ", got " + std::to_string(value));
    }

    // Memory is laid out at the first run, and another thread may be running the operations there are.
    void check_unfinished() const {
        if (finished_) throw py::value_error("a program that has run takes no more operations");
    }

    static const PackedMatrix& matrix_of(const Weight& weight) {
        if (!weight) throw py::value_error("the operation needs a packed weight, not None");
        return weight->matrix();
    }

    void deliver_rows_of(int64_t width) {
        if (out_width_ != 0) throw py::value_error("a program has one head, or delivers rows once");
        out_width_ = width;
    }

    void reads_next(const PackedMatrix& matrix) {
        if (last_linear_ != nullptr) last_linear_->then = &matrix;
    }

    int check_floats(const char* name, int id) const {
        if (id < 0 || id >= program_.activations.num_floats())
            throw py::value_error(std::string(name) + " names no rows of floats: " + std::to_string(id));
        return id;
    }

    void check_width(const char* name, int id, int64_t width) const {
        const int64_t have = program_.activations.width(check_floats(name, id));
        if (have != width)
            throw py::value_error(std::string(name) + " is " + std::to_string(have) + " numbers wide, not " +
                                  std::to_string(width));
    }

    // groups 0: any.
    void check_bytes(int id, int64_t width, int64_t groups) const {
        if (id < 0 || id >= static_cast<int>(bytes_.size()))
            throw py::value_error("bytes names no rows of bytes: " + std::to_string(id));
        const auto& [stride, have] = bytes_[static_cast<size_t>(id)];
        if (stride != round_up(width, kDepthUnit) || (groups != 0 && have != groups))
            throw py::value_error("the rows of bytes are made for another weight");
    }

    int64_t group_of(int bytes, int64_t width) const {
        if (bytes == kNone) return width;
        const auto& [stride, groups] = bytes_[static_cast<size_t>(bytes)];
        return groups == 1 ? width : stride / groups;
    }

    void check_inputs(const PackedMatrix& matrix, int x, int bytes) const {
        const bool takes_bytes = bytes != kNone;
        if (takes_bytes == (x != kNone) ||
            (takes_bytes ? matrix.storage < Storage::int8 : matrix.storage == Storage::int8))
            throw py::value_error(
                "a linear layer takes rows of floats, or of bytes where its weights are integers");
        if (takes_bytes)
            check_bytes(bytes, matrix.inputs, byte_groups(matrix));
        else if (program_.activations.width(check_floats("x", x)) < matrix.inputs)
            throw py::value_error("x is narrower than the weight's " + std::to_string(matrix.inputs) +
                                  " inputs");
    }

    static void check_heads(int64_t heads, int64_t kv_heads) {
        if (heads < 1 || heads > kMostHeads || heads % kv_heads != 0)
            throw py::value_error(std::to_string(kv_heads) + " kv heads do not divide " +
                                  std::to_string(heads) + " heads");
    }

    AttentionLayer layer_of(int64_t layer, int64_t heads) const {
        if (layer < 0 || layer >= layers_)
            throw py::value_error("the cache has no layer " + std::to_string(layer));
        check_heads(heads, layer_.cache.kv_heads);
        AttentionLayer own = layer_;
        own.heads = heads;
        own.layer_offset = layer * layer_.cache.layer_bytes();
        return own;
    }

    static void set_scores(AttentionLayer& layer, const Scores& scores, float softmax_scale) {
        const auto& [window, softcap, slopes, bias] = scores;
        const ScoreOptions checked = tandem::bindings::options_of(scores, layer.heads);
        layer.softmax_scale = softmax_scale;
        layer.window = window;
        layer.softcap = softcap;
        layer.max_distance = checked.max_distance;
        layer.alibi_slopes = numbers_of(slopes, "alibi_slopes", layer.heads);
        layer.distance_bias = numbers_of(bias, "distance_bias", layer.heads * (2 * checked.max_distance + 1));
    }

    // x begins with the queries, and for parts = 3 ends with keys and values.
    void check_attended(const AttentionLayer& layer, int x, int out, int parts) const {
        const int64_t head_dim = layer.cache.head_dim, queries = layer.heads * head_dim;
        const int64_t most = queries + 2 * layer.cache.kv_heads * head_dim;
        const int64_t width = program_.activations.width(check_floats("x", x));
        if (width != most && (parts == 3 || width != queries))
            throw py::value_error("x is " + std::to_string(width) +
                                  " numbers wide, not heads times head_dim");
        check_width("out", out, queries);
        if (x == out) throw py::value_error("out must be other rows than x");
    }

    void check_rotated(int64_t rotated, int64_t head_dim) const {
        if (rotated != 0 && (rotated != rotated_ || rotated > head_dim))
            throw py::value_error("a head turns as many elements as there are angles, or none");
    }

    // Each from 0 to below `end`; -1: no upper end.
    static const int64_t* ids_of(const py::array& array, const char* name, int64_t size, int64_t end) {
        require_run<int64_t>(array, name, size, "int64");
        const auto* data = static_cast<const int64_t*>(array.data());
        for (int64_t i = 0; i < size; ++i)
            if (data[i] < 0 || (end >= 0 && data[i] >= end))
                throw py::value_error(std::string(name) + " holds " + std::to_string(data[i]) +
                                      ", not between 0 and " + std::to_string(end - 1));
        return data;
    }

    static const int32_t* offsets_of(const py::array& array, Step& step) {
        require_run<int32_t>(array, "cu_seqlens", std::max<py::ssize_t>(1, array.size()), "int32");
        const auto* data = static_cast<const int32_t*>(array.data());
        tandem::bindings::check_offsets(data, "cu_seqlens", step.sequences, step.tokens);
        for (int64_t b = 0; b < step.sequences; ++b)
            step.longest = std::max(step.longest, data[b + 1] - data[b]);
        return data;
    }

    int64_t cache_of(py::array& cache, Step& step) const {
        const int64_t bytes = layer_.cache.block_bytes;
        const bool fits = is<uint8_t>(cache) && cache.ndim() == 2 && cache.shape(1) == bytes &&
                          cache.writeable() && (cache.flags() & py::array::c_style) != 0 &&
                          reinterpret_cast<uintptr_t>(cache.data()) % 64 == 0;
        require(fits, "cache",
                "contiguous uint8 (num_blocks, " + std::to_string(bytes) + ") on a boundary of 64 bytes",
                cache);
        step.cache = static_cast<std::byte*>(cache.mutable_data());
        return cache.shape(0);
    }

    SequenceTable table_of(const Optional& lengths, const Optional& blocks, const std::string& prefix,
                           const Step& step, int64_t num_blocks) const {
        if (!lengths || !blocks) throw py::value_error("the program needs " + prefix + "lengths and blocks");
        require_run<int32_t>(*lengths, (prefix + "lengths").c_str(), step.sequences, "int32");
        const bool fits = blocks->ndim() == 2 && blocks->shape(0) == step.sequences;
        require(fits, (prefix + "blocks").c_str(), "int32 (sequences, blocks)", *blocks);
        require_run<int32_t>(*blocks, (prefix + "blocks").c_str(), blocks->size(), "int32");
        const SequenceTable table = {static_cast<const int32_t*>(lengths->data()),
                                     static_cast<const int32_t*>(blocks->data()), blocks->shape(1)};
        const int64_t block_size = layer_.cache.block_size;
        for (int64_t b = 0; b < step.sequences; ++b) {
            const int64_t used = (table.lengths[b] + block_size - 1) / block_size;
            const int64_t queries = prefix.empty() ? step.cu_seqlens[b + 1] - step.cu_seqlens[b] : 0;
            bool good = table.lengths[b] >= queries && used <= table.stride;
            for (int64_t i = 0; good && i < used; ++i) {
                const int32_t block = table.blocks[b * table.stride + i];
                good = block >= 0 && block < num_blocks;
            }
            if (!good)
                throw py::value_error("the " + prefix + "blocks of sequence " + std::to_string(b) +
                                      " do not hold its keys");
        }
        return table;
    }

    Program program_;
    LinearLayer* last_linear_ = nullptr;
    AttentionLayer layer_{};
    int64_t layers_ = 0, rotated_ = 0, num_tokens_ = 0, num_positions_ = -1, out_width_ = 0;
    bool writes_cache_ = false, reads_own_ = false, reads_source_ = false, finished_ = false;
    std::vector<std::pair<int64_t, int64_t>> bytes_;  // stride and groups
};

}  // namespace

void tandem::register_program(py::module_& module) {
    py::class_<Builder>(module, "Program")
        .def(py::init<>())
        .def("floats", &Builder::floats)
        .def("bytes", &Builder::bytes)
        .def("embed", &Builder::embed)
        .def("rotary", &Builder::rotary)
        .def("norm", &Builder::norm)
        .def("select", &Builder::select)
        .def("quantize", &Builder::quantize)
        .def("linear", &Builder::linear)
        .def("head", &Builder::head)
        .def("deliver", &Builder::deliver)
        .def("cache", &Builder::cache)
        .def("append", &Builder::append)
        .def("attend", &Builder::attend)
        .def("attend_within", &Builder::attend_within)
        .def("run", &Builder::run)
        .def("take_seconds", &Builder::take_seconds)
        .def_property_readonly("nbytes", &Builder::nbytes);
}
