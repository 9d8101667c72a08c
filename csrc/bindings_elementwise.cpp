// The Python face of activations, rotary positions and the transpose.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings.h"
#include "bindings_checks.h"
#include "elementwise.h"
#include "transpose.h"

namespace py = pybind11;
using tandem::check_threads;
using tandem::require;

namespace {

constexpr py::ssize_t kFloat = sizeof(float);

const float* read(const py::array& array) { return static_cast<const float*>(array.data()); }
float* write(py::array& array) { return static_cast<float*>(array.mutable_data()); }

const tandem::Activation& activation_of(bool tanh) {
    return tanh ? tandem::elementwise_kernels().gelu_new : tandem::elementwise_kernels().gelu;
}

void gelu(const py::array& x, bool tanh, py::array& out, int num_threads) {
    check_threads(num_threads);
    tandem::require_run<float>(x, "x", x.size(), "float32");
    tandem::require_run<float>(out, "out", x.size(), "float32");
    const float* from = read(x);
    float* to = write(out);
    const int64_t n = x.size();
    const py::gil_scoped_release release;
    tandem::activate(activation_of(tanh), from, to, n, num_threads);
}

void gelu_backward(const py::array& x, const py::array& grad_out, bool tanh, py::array& grad_x,
                   int num_threads) {
    check_threads(num_threads);
    tandem::require_run<float>(x, "x", x.size(), "float32");
    tandem::require_run<float>(grad_out, "grad_out", x.size(), "float32");
    tandem::require_run<float>(grad_x, "grad_x", x.size(), "float32");
    const float *from = read(x), *grad = read(grad_out);
    float* to = write(grad_x);
    const int64_t n = x.size();
    const py::gil_scoped_release release;
    tandem::differentiate(activation_of(tanh), from, grad, to, n, num_threads);
}

// x (batch, tokens, heads, head_dim) with the last dimension contiguous; cos and sin (tokens, head_dim / 2).
void rotate(const py::array& x, const py::array& cos, const py::array& sin, bool back, py::array& out,
            int num_threads) {
    check_threads(num_threads);
    bool fits = tandem::is<float>(x) && x.ndim() == 4 && x.shape(3) % 2 == 0 &&
                (x.shape(3) == 0 || x.size() == 0 || x.strides(3) == kFloat);
    for (py::ssize_t i = 0; fits && i < 3; ++i) fits = x.strides(i) % kFloat == 0;
    require(fits, "x", "float32 with 4 dimensions, the last even and contiguous", x);
    const int64_t half = x.shape(3) / 2;
    tandem::require_run<float>(cos, "cos", x.shape(1) * half, "float32");
    tandem::require_run<float>(sin, "sin", x.shape(1) * half, "float32");
    tandem::require_run<float>(out, "out", x.size(), "float32");
    const tandem::Rotation rotation = {read(x),
                                       x.strides(0) / kFloat,
                                       x.strides(1) / kFloat,
                                       x.strides(2) / kFloat,
                                       x.shape(0),
                                       x.shape(1),
                                       x.shape(2),
                                       half,
                                       read(cos),
                                       read(sin),
                                       back ? -1.0f : 1.0f,
                                       write(out)};
    const py::gil_scoped_release release;
    tandem::rotate(rotation, num_threads);
}

void transpose(const py::array& x, py::array& out, std::optional<py::array>& sums, int num_threads) {
    check_threads(num_threads);
    const bool fits = tandem::is<float>(x) && x.ndim() == 2 &&
                      (x.size() == 0 || x.shape(1) == 1 || x.strides(1) == kFloat) &&
                      x.strides(0) % kFloat == 0;
    require(fits, "x", "a float32 matrix with contiguous rows", x);
    tandem::require_run<float>(out, "out", x.size(), "float32");
    if (sums) tandem::require_run<float>(*sums, "sums", x.shape(1), "float32");
    const float* from = read(x);
    float* to = write(out);
    float* totals = sums ? write(*sums) : nullptr;
    const int64_t rows = x.shape(0), columns = x.shape(1), stride = x.strides(0) / kFloat;
    const py::gil_scoped_release release;
    tandem::transpose(from, rows, columns, stride, to, totals, num_threads);
}

}  // namespace

void tandem::register_elementwise(py::module_& module) {
    module.def("gelu", &::gelu);
    module.def("gelu_backward", &::gelu_backward);
    module.def("rotate", &::rotate);
    module.def("transpose", &::transpose);
}
