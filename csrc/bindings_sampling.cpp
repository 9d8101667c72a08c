// The Python face of sampling and of what prepares scores for a choice.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bindings_checks.h"
#include "log_softmax.h"
#include "logit_edits.h"
#include "philox.h"
#include "row_kernels.h"
#include "sampling.h"

namespace py = pybind11;

namespace {

using tandem::SamplingRequests;

// A 1-D contiguous array of exactly this type and length; its memory must outlive the pointer.
template <class T>
const T* column(const py::array& array, const char* name, int64_t length) {
    const bool fits = array.dtype().equal(py::dtype::of<T>()) && tandem::is_aligned(array) &&
                      array.ndim() == 1 && array.shape(0) == length &&
                      (length < 2 || array.strides(0) == static_cast<py::ssize_t>(sizeof(T)));
    if (fits) return static_cast<const T*>(array.data());
    throw py::value_error(std::string(name) + " must be a contiguous " +
                          py::str(py::dtype::of<T>()).cast<std::string>() + " array of shape (" +
                          std::to_string(length) + ",), got " + py::str(array.dtype()).cast<std::string>() +
                          " of shape " + py::str(array.attr("shape")).cast<std::string>());
}

// The columns of a batch by name. Keeps the arrays alive and lends their memory, which is read at each call,
// so that their owner may change values in place between calls.
class Columns {
  public:
    explicit Columns(py::dict fields) : fields_(std::move(fields)) {}

    int64_t length_of(const char* name) const {
        const py::array array = fields_[name];
        if (array.ndim() != 1) throw py::value_error(std::string(name) + " must have one dimension");
        return array.shape(0);
    }

    template <class T>
    void take(const char* name, const T*& pointer, int64_t length) {
        py::array array = fields_[name];
        pointer = column<T>(array, name, length);
        arrays_.push_back(std::move(array));
    }

    template <class T>
    void take_table(const char* name, const T*& pointer, int64_t& rows, int64_t& width) {
        py::array array = fields_[name];
        const bool fits =
            tandem::is<T>(array) && array.ndim() == 2 && (array.flags() & py::array::c_style) != 0;
        tandem::require(fits, name,
                        "a contiguous " + py::str(py::dtype::of<T>()).cast<std::string>() + " matrix", array);
        pointer = static_cast<const T*>(array.data());
        rows = array.shape(0);
        width = array.shape(1);
        arrays_.push_back(std::move(array));
    }

  private:
    py::dict fields_;
    std::vector<py::array> arrays_;
};

void take_histories(Columns& columns, int64_t rows, tandem::Histories& histories) {
    histories.size = columns.length_of("history_ids");
    columns.take("history_ids", histories.ids, histories.size);
    columns.take("history_starts", histories.starts, rows);
    columns.take("history_lengths", histories.lengths, rows);
}

// The checked parameters of a batch.
class SamplingBatch {
  public:
    explicit SamplingBatch(const py::dict& fields) : columns_(fields) {
        SamplingRequests& r = requests_;
        r.rows = columns_.length_of("temperature");
        columns_.take("temperature", r.temperature, r.rows);
        columns_.take("top_k", r.top_k, r.rows);
        columns_.take("top_p", r.top_p, r.rows);
        columns_.take("min_p", r.min_p, r.rows);
        columns_.take("typical_p", r.typical_p, r.rows);
        columns_.take("repetition_penalty", r.repetition_penalty, r.rows);
        columns_.take("presence_penalty", r.presence_penalty, r.rows);
        columns_.take("frequency_penalty", r.frequency_penalty, r.rows);
        columns_.take("seed", r.seed, r.rows);
        columns_.take("position", r.position, r.rows);
        columns_.take("num_logprobs", r.num_logprobs, r.rows);
        take_histories(columns_, r.rows, r.histories);
        columns_.take("prompt_lengths", r.histories.prompt_lengths, r.rows);
        tandem::check(r);
        for (int64_t row = 0; row < r.rows; ++row)
            top_columns_ = std::max<int64_t>(top_columns_, r.num_logprobs[row]);
    }

    const SamplingRequests& requests() const { return requests_; }
    int64_t top_columns() const { return top_columns_; }

  private:
    Columns columns_;
    SamplingRequests requests_{};
    int64_t top_columns_ = 0;
};

// The checked edits of a batch.
class LogitEdits {
  public:
    explicit LogitEdits(const py::dict& fields) : columns_(fields) {
        tandem::LogitEdits& e = edits_;
        e.count = columns_.length_of("rows");
        e.biases = columns_.length_of("bias_ids");
        columns_.take("rows", e.rows, e.count);
        columns_.take("repetition_penalty", e.repetition_penalty, e.count);
        columns_.take("no_repeat_ngram_size", e.no_repeat_ngram_size, e.count);
        columns_.take("bias_offsets", e.bias_offsets, e.count + 1);
        columns_.take("bias_ids", e.bias_ids, e.biases);
        columns_.take("bias_values", e.bias_values, e.biases);
        columns_.take("forced", e.forced, e.count);
        columns_.take("mask", e.mask, e.count);
        columns_.take_table("masks", e.masks, e.num_masks, e.mask_words);
        take_histories(columns_, e.count, e.histories);
        tandem::check(e);
    }

    const tandem::LogitEdits& edits() const { return edits_; }

  private:
    Columns columns_;
    tandem::LogitEdits edits_{};
};

// Refuses what is not rows of contiguous float32.
void check_rows(const py::array& array, const char* name) {
    const auto float_size = static_cast<py::ssize_t>(sizeof(float));
    if (!tandem::is<float>(array) || array.ndim() != 2 || array.shape(1) < 1 ||
        (array.size() > 1 && array.shape(1) > 1 && array.strides(1) != float_size) ||
        array.strides(0) % float_size != 0)
        tandem::refuse(name, "float32 of shape (rows, vocab) with contiguous rows", array);
    if (array.shape(1) > std::numeric_limits<int32_t>::max() - tandem::kBlock)
        throw py::value_error(std::string(name) + " have too large a vocabulary");
}

int64_t stride_of(const py::array& array) {
    return array.strides(0) / static_cast<py::ssize_t>(sizeof(float));
}

tandem::Logits logits_of(const py::array& array, const char* name) {
    check_rows(array, name);
    return {static_cast<const float*>(array.data()), array.shape(0), array.shape(1), stride_of(array)};
}

tandem::Scores scores_of(py::array& array) {
    check_rows(array, "scores");
    const int64_t stride = stride_of(array);
    if (array.shape(0) > 1 && std::abs(stride) < array.shape(1))
        tandem::refuse("scores", "rows that do not overlap, since they are written", array);
    return {static_cast<float*>(array.mutable_data()), array.shape(0), array.shape(1), stride};
}

py::list messages_of(const std::vector<tandem::RowError>& errors) {
    py::list messages(errors.size());
    for (size_t row = 0; row < errors.size(); ++row)
        messages[row] = py::cast(tandem::message_of(errors[row]));  // null becomes None
    return messages;
}

py::tuple sample(const py::array& array, const SamplingBatch& batch, int num_threads) {
    tandem::check_threads(num_threads);
    const tandem::Logits logits = logits_of(array, "logits");
    if (logits.rows != batch.requests().rows)
        throw py::value_error("logits have " + std::to_string(logits.rows) + " rows, the batch has " +
                              std::to_string(batch.requests().rows));
    py::array_t<int64_t> token_ids(logits.rows);
    py::array_t<float> logprobs(logits.rows);
    py::array_t<int32_t> ranks(logits.rows);
    py::array_t<float> top_logprobs({logits.rows, batch.top_columns()});
    py::array_t<int64_t> top_ids({logits.rows, batch.top_columns()});
    std::vector<tandem::RowError> errors(static_cast<size_t>(logits.rows));
    const tandem::SamplingResults results = {
        token_ids.mutable_data(), logprobs.mutable_data(), ranks.mutable_data(), top_logprobs.mutable_data(),
        top_ids.mutable_data(),   batch.top_columns(),     errors.data()};
    {
        const py::gil_scoped_release release;
        tandem::sample(logits, batch.requests(), results, num_threads);
    }
    return py::make_tuple(token_ids, logprobs, ranks, top_logprobs, top_ids, messages_of(errors));
}

py::tuple top_k(const py::array& array, int64_t k, int num_threads) {
    tandem::check_threads(num_threads);
    const tandem::Logits scores = logits_of(array, "scores");
    if (k < 1 || k > scores.vocab)
        throw py::value_error("k must be from 1 to " + std::to_string(scores.vocab) + ", got " +
                              std::to_string(k));
    py::array_t<float> values({scores.rows, k});
    py::array_t<int64_t> ids({scores.rows, k});
    float* first_value = values.mutable_data();
    int64_t* first_id = ids.mutable_data();
    {
        const py::gil_scoped_release release;
        tandem::top_k(scores, k, first_value, first_id, num_threads);
    }
    return py::make_tuple(values, ids);
}

void edit_logits(py::array& array, const LogitEdits& edits, int num_threads) {
    tandem::check_threads(num_threads);
    const tandem::Scores scores = scores_of(array);
    const py::gil_scoped_release release;
    tandem::edit_logits(scores, edits.edits(), num_threads);
}

void log_softmax(py::array& array, int num_threads) {
    tandem::check_threads(num_threads);
    const tandem::Scores scores = scores_of(array);
    const py::gil_scoped_release release;
    tandem::log_softmax(scores, num_threads);
}

}  // namespace

void tandem::register_sampling(py::module_& module) {
    py::class_<SamplingBatch>(module, "SamplingBatch").def(py::init<const py::dict&>());
    module.def("sample", &::sample, py::arg("logits"), py::arg("batch"), py::arg("num_threads"));
    module.def("top_k", &::top_k, py::arg("scores"), py::arg("k"), py::arg("num_threads"));
    py::class_<::LogitEdits>(module, "LogitEdits").def(py::init<const py::dict&>());
    module.def("edit_logits", &::edit_logits, py::arg("scores"), py::arg("edits"), py::arg("num_threads"));
    module.def("log_softmax", &::log_softmax, py::arg("scores"), py::arg("num_threads"));
    module.def("uniform", &tandem::uniform, py::arg("seed"), py::arg("position"));
}
