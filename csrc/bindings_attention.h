// The checks that the bindings of attention share. Errors are Python's ValueError.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>

#include "attention.h"
#include "bindings_checks.h"

namespace tandem::bindings {

namespace py = pybind11;

using Optional = std::optional<py::array>;
// window, softcap, alibi_slopes, distance_bias, as ScoreOptions has them
using Scores = std::tuple<int64_t, float, Optional, Optional>;

inline const int32_t* integers(const Optional& array, const char* name, int64_t length) {
    if (!array) return nullptr;
    const bool fits = is<int32_t>(*array) && array->ndim() == 1 && array->shape(0) == length &&
                      (length < 2 || array->strides(0) == sizeof(int32_t));
    if (!fits) refuse(name, "contiguous int32 of shape (" + std::to_string(length) + ",)", *array);
    return static_cast<const int32_t*>(array->data());
}

inline void check_offsets(const int32_t* offsets, const char* name, int64_t batch, int64_t tokens) {
    bool fits = offsets[0] == 0 && offsets[batch] == tokens;
    for (int64_t b = 0; fits && b < batch; ++b) fits = offsets[b] <= offsets[b + 1];
    if (!fits)
        throw py::value_error(std::string(name) + " must rise from 0 to the number of tokens, " +
                              std::to_string(tokens));
}

inline void check_lengths(const int32_t* lengths, const char* name, int64_t batch, int64_t most) {
    for (int64_t b = 0; b < batch; ++b)
        if (lengths[b] < 0 || lengths[b] > most)
            throw py::value_error(std::string(name) + " must be between 0 and " + std::to_string(most) +
                                  ", got " + std::to_string(lengths[b]) + " for sequence " +
                                  std::to_string(b));
}

inline void check_same_shape(const py::array& array, const char* name, const py::array& like) {
    bool same = array.ndim() == like.ndim();
    for (py::ssize_t i = 0; same && i < like.ndim(); ++i) same = array.shape(i) == like.shape(i);
    if (!same)
        throw py::value_error(std::string(name) + " must have shape " + shape_of(like) + ", got " +
                              shape_of(array));
}

inline const float* run_of(const Optional& array, const char* name, int64_t size) {
    if (!array) return nullptr;
    const bool fits =
        is<float>(*array) && array->size() == size && (array->flags() & py::array::c_style) != 0;
    if (!fits) refuse(name, "contiguous float32 of " + std::to_string(size) + " numbers", *array);
    return static_cast<const float*>(array->data());
}

inline ScoreOptions options_of(const Scores& scores, int64_t heads) {
    const auto& [window, softcap, alibi_slopes, distance_bias] = scores;
    if (window < 0 || !(softcap >= 0)) throw py::value_error("window and softcap must not be negative");
    ScoreOptions options{};
    options.window = window;
    options.softcap = softcap;
    options.alibi_slopes = run_of(alibi_slopes, "alibi_slopes", heads);
    if (!distance_bias) return options;
    if (distance_bias->ndim() != 2 || distance_bias->shape(1) % 2 == 0)
        refuse("distance_bias", "(heads, 2 * max_distance + 1)", *distance_bias);
    options.max_distance = distance_bias->shape(1) / 2;
    options.distance_bias = run_of(distance_bias, "distance_bias", heads * distance_bias->shape(1));
    return options;
}

}  // namespace tandem::bindings
