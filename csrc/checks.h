// Refusals of arrays that a kernel cannot take, each in a sentence. Only for files of bindings.
#pragma once

#include <pybind11/numpy.h>

#include <string>

namespace tandem {

inline void require(bool fits, const char* name, const std::string& wanted, const pybind11::array& array) {
    if (fits) return;
    throw pybind11::value_error(std::string(name) + " must be " + wanted + ", got " +
                                pybind11::str(array.dtype()).cast<std::string>() + " of shape " +
                                pybind11::str(array.attr("shape")).cast<std::string>() + " and strides " +
                                pybind11::str(array.attr("strides")).cast<std::string>() + " in bytes");
}

template <class T>
bool is(const pybind11::array& array) {
    return pybind11::isinstance<pybind11::array_t<T>>(array);
}

template <class T>
void require_run(const pybind11::array& array, const char* name, pybind11::ssize_t size,
                 const std::string& kind) {
    require(is<T>(array) && array.size() == size && (array.flags() & pybind11::array::c_style) != 0, name,
            "contiguous " + kind + " of " + std::to_string(size) + " elements", array);
}

inline void check_threads(int num_threads) {
    if (num_threads < 1)
        throw pybind11::value_error("num_threads must be at least 1, got " + std::to_string(num_threads));
}

// The first and last byte of an array with strides that are not negative.
inline std::pair<const char*, const char*> extent_of(const pybind11::array& array) {
    const auto* begin = static_cast<const char*>(array.data());
    pybind11::ssize_t last = array.itemsize();
    for (pybind11::ssize_t i = 0; i < array.ndim(); ++i) last += (array.shape(i) - 1) * array.strides(i);
    return {begin, begin + last};
}

// An output may not lie over an input.
inline void refuse_overlap(const pybind11::array& input, const pybind11::array& out, const char* name) {
    if (input.size() == 0 || out.size() == 0) return;
    const auto [a, b] = extent_of(input);
    const auto [c, d] = extent_of(out);
    if (a < d && c < b) throw pybind11::value_error(std::string("out overlaps ") + name);
}

}  // namespace tandem
