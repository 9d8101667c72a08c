// The Python face of packed weights and the linear layer over them.
#include "bindings_linear.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "bindings_checks.h"
#include "linear.h"
#include "packed_weight.h"

namespace py = pybind11;
using namespace tandem;

namespace {

using Optional = std::optional<py::array>;

// The rows of a source of `count` rows in their order, each its own place's unless given.
std::vector<int64_t> order_of(const Optional& order, int64_t count) {
    std::vector<int64_t> rows;
    if (!order) {
        for (int64_t i = 0; i < count; ++i) rows.push_back(i);
        return rows;
    }
    require_run<int64_t>(*order, "order", order->size(), "int64");
    const auto* given = static_cast<const int64_t*>(order->data());
    rows.assign(given, given + order->size());
    for (int64_t row : rows)
        if (row < -1 || row >= count)
            throw py::value_error("order names row " + std::to_string(row) + " of " + std::to_string(count));
    return rows;
}

template <class Source>
std::shared_ptr<PackedWeight> pack(PackedMatrix shape, const Source& source,
                                   const std::vector<int64_t>& order, int num_threads) {
    check_threads(num_threads);
    const py::gil_scoped_release release;
    shape.outputs = static_cast<int64_t>(order.size());
    return std::make_shared<PackedWeight>(shape, source, order, num_threads);
}

void require_matrix(const py::array& array, const char* name, bool is_wanted, const std::string& kind) {
    const bool fits = is_wanted && array.ndim() == 2 && array.shape(1) > 0 &&
                      (array.shape(1) == 1 || array.strides(1) == array.itemsize()) &&
                      array.strides(0) % array.itemsize() == 0;
    require(fits, name, "a matrix of " + kind + " with contiguous rows that are not empty", array);
}

std::shared_ptr<PackedWeight> from_floats(const py::array& values, bool bfloat16, const Optional& order,
                                          int num_threads) {
    const bool wide = is<float>(values);
    require_matrix(values, "values", wide || is<uint16_t>(values), "float32 or uint16");
    PackedMatrix shape{};
    shape.storage = wide ? Storage::float32 : bfloat16 ? Storage::bfloat16 : Storage::float16;
    shape.inputs = values.shape(1);
    const FloatSource source = {values.data(), values.strides(0) / values.itemsize()};
    return pack(shape, source, order_of(order, values.shape(0)), num_threads);
}

std::shared_ptr<PackedWeight> from_int8(const py::array& values, const py::array& scales,
                                        const Optional& order, int num_threads) {
    require_matrix(values, "values", is<int8_t>(values), "int8");
    require_run<float>(scales, "scales", values.shape(0), "float32");
    // Where integers add up to more than thirty-two bits hold.
    constexpr py::ssize_t kMostInputs = std::numeric_limits<int32_t>::max() / (255 * 127);
    if (values.shape(1) > kMostInputs)
        throw py::value_error("int8 weights have at most " + std::to_string(kMostInputs) + " inputs, got " +
                              std::to_string(values.shape(1)));
    PackedMatrix shape{};
    shape.storage = Storage::int8;
    shape.inputs = values.shape(1);
    const std::vector<int64_t> rows = order_of(order, values.shape(0));
    const Int8Source source = {static_cast<const int8_t*>(values.data()), values.strides(0)};
    auto packed = pack(shape, source, rows, num_threads);
    packed->set_scales(static_cast<const float*>(scales.data()), rows);
    return packed;
}

std::shared_ptr<PackedWeight> from_int4(const py::array& values, const py::array& scales,
                                        const Optional& minimums, const Optional& order, int num_threads) {
    require_matrix(values, "values", is<uint8_t>(values), "uint8");
    const py::ssize_t rows = values.shape(0), inputs = 2 * values.shape(1);
    require_matrix(scales, "scales", is<uint16_t>(scales), "float16, as uint16,");
    const py::ssize_t groups = scales.shape(1), group = inputs / groups;
    require((group == 32 || group == 64) && group * groups == inputs, "scales",
            "one for each 32 or 64 of " + std::to_string(inputs) + " inputs", scales);
    require_run<uint16_t>(scales, "scales", rows * groups, "uint16");
    if (minimums) require_run<uint16_t>(*minimums, "minimums", rows * groups, "uint16");
    PackedMatrix shape{};
    shape.storage = Storage::int4;
    shape.inputs = inputs;
    shape.group = group;
    shape.symmetric = !minimums;
    const Int4Source source = {static_cast<const uint8_t*>(values.data()), values.strides(0),
                               static_cast<const uint16_t*>(scales.data()),
                               minimums ? static_cast<const uint16_t*>(minimums->data()) : nullptr};
    return pack(shape, source, order_of(order, rows), num_threads);
}

// Float32 rows of the given outputs, (ids, inputs).
py::array_t<float> unpack(const PackedWeight& weight, const py::array& ids) {
    require_run<int64_t>(ids, "ids", ids.size(), "int64");
    const PackedMatrix& matrix = weight.matrix();
    const auto* given = static_cast<const int64_t*>(ids.data());
    py::array_t<float> out({ids.size(), static_cast<py::ssize_t>(matrix.inputs)});
    for (py::ssize_t i = 0; i < ids.size(); ++i) {
        if (given[i] < 0 || given[i] >= matrix.outputs)
            throw py::value_error("id " + std::to_string(given[i]) + " is not one of " +
                                  std::to_string(matrix.outputs) + " outputs");
        unpack_row(matrix, given[i], out.mutable_data(i));
    }
    return out;
}

FloatRows rows_of(const py::array& x, const char* name, py::ssize_t width) {
    const bool fits = is<float>(x) && x.ndim() == 2 && x.shape(1) == width &&
                      (x.size() == 0 || width == 1 || x.strides(1) == x.itemsize()) &&
                      x.strides(0) % x.itemsize() == 0 &&
                      (x.shape(0) < 2 || x.strides(0) >= width * x.itemsize());
    require(fits, name, "float32 rows of " + std::to_string(width) + " that are contiguous and apart", x);
    return {static_cast<const float*>(x.data()), x.strides(0) / x.itemsize()};
}

void linear_op(const py::array& x, const PackedWeight& weight, const Optional& bias,
               const std::string& activation, bool gated, const Optional& residual, bool widen,
               py::array& out, int num_threads) {
    check_threads(num_threads);
    const PackedMatrix& matrix = weight.matrix();
    const py::ssize_t width = gated ? matrix.outputs / 2 : matrix.outputs,
                      rows = x.ndim() == 2 ? x.shape(0) : 0;
    if (gated && matrix.outputs % kChunk != 0)
        throw py::value_error("a gated layer needs a multiple of 64 outputs, got " +
                              std::to_string(matrix.outputs));
    const FloatRows from = rows_of(x, "x", matrix.inputs), to = rows_of(out, "out", width);
    require(out.shape(0) == rows && out.writeable(), "out", "writeable, with x's number of rows", out);
    check_apart(out, "out", x, "x");
    std::vector<float> padded;
    if (bias) {
        require_run<float>(*bias, "bias", matrix.outputs, "float32");
        const auto* given = static_cast<const float*>(bias->data());
        padded.assign(given, given + matrix.outputs);
        padded.resize(static_cast<size_t>(matrix.chunks() * kChunk));
    }
    Epilogue epilogue{bias ? padded.data() : nullptr,
                      activation_named(activation),
                      gated,
                      nullptr,
                      0,
                      static_cast<float*>(out.mutable_data()),
                      to.stride};
    if (residual) {
        const FloatRows added = rows_of(*residual, "residual", width);
        require(residual->shape(0) == rows, "residual", "of out's shape", *residual);
        const bool in_place =
            residual->data() == out.data() && (rows < 2 || residual->strides(0) == out.strides(0));
        if (!in_place) check_apart(out, "out", *residual, "residual");
        epilogue.residual = added.data;
        epilogue.residual_stride = added.stride;
    }
    const py::gil_scoped_release release;
    const bool bytes = matrix.storage >= Storage::int8 && !(widen && matrix.storage == Storage::int4);
    if (!bytes) {
        const LinearBatch batch = {&matrix, from, {}, epilogue, nullptr};
        return run_team(num_threads, [&](Team& team) { linear(batch, rows, team); });
    }
    QuantizedRows quantized(matrix, rows);
    const LinearBatch batch = {&matrix, {}, quantized.view(), epilogue, nullptr};
    run_team(num_threads, [&](Team& team) {
        quantize_rows(from, rows, matrix.inputs, matrix.group, batch.bytes, team);
        linear(batch, rows, team);
    });
}

}  // namespace

ActivationKind tandem::activation_named(const std::string& name) {
    constexpr std::pair<const char*, ActivationKind> kinds[] = {
        {"none", ActivationKind::none}, {"relu", ActivationKind::relu},
        {"gelu", ActivationKind::gelu}, {"gelu_new", ActivationKind::gelu_new},
        {"silu", ActivationKind::silu},
    };
    for (const auto& [known, kind] : kinds)
        if (name == known) return kind;
    throw py::value_error("activation must be none, relu, gelu, gelu_new or silu, got " + name);
}

void tandem::register_linear(py::module_& module) {
    py::class_<PackedWeight, std::shared_ptr<PackedWeight>>(module, "PackedWeight")
        .def_static("from_floats", &from_floats)
        .def_static("from_int8", &from_int8)
        .def_static("from_int4", &from_int4)
        .def("rows", &unpack)
        .def_property_readonly("storage", [](const PackedWeight& w) { return name_of(w.matrix().storage); })
        .def_property_readonly("outputs", [](const PackedWeight& w) { return w.matrix().outputs; })
        .def_property_readonly("inputs", [](const PackedWeight& w) { return w.matrix().inputs; })
        .def_property_readonly("takes_bytes",
                               [](const PackedWeight& w) { return w.matrix().storage >= Storage::int8; })
        // Of the rows of bytes it takes: their width, and the groups their sums are of.
        .def_property_readonly(
            "byte_layout",
            [](const PackedWeight& w) { return std::pair(byte_stride(w.matrix()), byte_groups(w.matrix())); })
        .def_property_readonly("nbytes", &PackedWeight::nbytes);
    module.def("linear", &linear_op);
}
