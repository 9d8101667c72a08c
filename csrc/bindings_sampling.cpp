// The Python face of sampling and of what prepares scores for a choice.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bindings_checks.h"
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

tandem::Logits logits_of(const py::array& array, int64_t rows) {
    const auto float_size = static_cast<py::ssize_t>(sizeof(float));
    if (!tandem::is<float>(array) || array.ndim() != 2 || array.shape(1) < 1 ||
        (array.size() > 1 && array.shape(1) > 1 && array.strides(1) != float_size) ||
        array.strides(0) % float_size != 0)
        throw py::value_error("logits must be float32 of shape (rows, vocab) with contiguous rows, got " +
                              py::str(array.dtype()).cast<std::string>() + " of shape " +
                              py::str(array.attr("shape")).cast<std::string>() + " and strides " +
                              py::str(array.attr("strides")).cast<std::string>() + " in bytes");
    if (array.shape(0) != rows)
        throw py::value_error("logits have " + std::to_string(array.shape(0)) + " rows, the batch has " +
                              std::to_string(rows));
    if (array.shape(1) > std::numeric_limits<int32_t>::max() - tandem::kBlock)
        throw py::value_error("logits have too large a vocabulary");
    return {static_cast<const float*>(array.data()), rows, array.shape(1), array.strides(0) / float_size};
}

py::list messages_of(const std::vector<tandem::RowError>& errors) {
    py::list messages(errors.size());
    for (size_t row = 0; row < errors.size(); ++row)
        messages[row] = py::cast(tandem::message_of(errors[row]));  // null becomes None
    return messages;
}

py::tuple sample(const py::array& array, const SamplingBatch& batch, int num_threads) {
    tandem::check_threads(num_threads);
    const tandem::Logits logits = logits_of(array, batch.requests().rows);
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
    const tandem::Logits scores = logits_of(array, array.ndim() > 0 ? array.shape(0) : 0);
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

}  // namespace

void tandem::register_sampling(py::module_& module) {
    py::class_<SamplingBatch>(module, "SamplingBatch").def(py::init<const py::dict&>());
    module.def("sample", &::sample, py::arg("logits"), py::arg("batch"), py::arg("num_threads"));
    module.def("top_k", &::top_k, py::arg("scores"), py::arg("k"), py::arg("num_threads"));
    module.def("uniform", &tandem::uniform, py::arg("seed"), py::arg("position"));
}
