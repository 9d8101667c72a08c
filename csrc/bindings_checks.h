// Refusals of arrays that a kernel cannot take, each in a sentence. Only for files of bindings.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <string>
#include <utility>

namespace tandem {

inline std::string shape_of(const pybind11::array& array) {
    return pybind11::str(array.attr("shape")).cast<std::string>();
}

// Whether each element lies on a boundary of its type, as a cut through a buffer of bytes may not.
inline bool is_aligned(const pybind11::array& array) {
    return (array.flags() & pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
}

[[noreturn]] inline void refuse(const char* name, const std::string& wanted, const pybind11::array& array) {
    throw pybind11::value_error(std::string(name) + " must be " + wanted + ", got " +
                                pybind11::str(array.dtype()).cast<std::string>() + " of shape " +
                                shape_of(array) + " and strides " +
                                pybind11::str(array.attr("strides")).cast<std::string>() + " in bytes" +
                                (is_aligned(array) ? "" : ", off the boundaries of its type"));
}

inline void require(bool fits, const char* name, const std::string& wanted, const pybind11::array& array) {
    if (!fits) refuse(name, wanted, array);
}

template <class T>
bool is(const pybind11::array& array) {
    return pybind11::isinstance<pybind11::array_t<T>>(array) && is_aligned(array);
}

template <class T>
void require_run(const pybind11::array& array, const char* name, pybind11::ssize_t size,
                 const std::string& kind) {
    require(is<T>(array) && array.size() == size && (array.flags() & pybind11::array::c_style) != 0, name,
            "contiguous " + kind + " of " + std::to_string(size) + " elements", array);
}

// More threads than a machine has may be more than it can start, which OpenMP does not survive.
constexpr int kMostThreads = 1024;

inline void check_threads(int num_threads) {
    if (num_threads < 1 || num_threads > kMostThreads)
        throw pybind11::value_error("num_threads must be between 1 and " + std::to_string(kMostThreads) +
                                    ", got " + std::to_string(num_threads));
}

// The bytes from an array's first element to its last, whatever lies between them.
inline std::pair<uintptr_t, uintptr_t> extent_of(const pybind11::array& array) {
    const auto begin = reinterpret_cast<uintptr_t>(array.data());
    if (array.size() == 0) return {begin, begin};
    pybind11::ssize_t low = 0, high = array.itemsize();
    for (pybind11::ssize_t i = 0; i < array.ndim(); ++i) {
        const pybind11::ssize_t reach = (array.shape(i) - 1) * array.strides(i);
        (reach < 0 ? low : high) += reach;
    }
    return {begin + static_cast<uintptr_t>(low), begin + static_cast<uintptr_t>(high)};
}

inline void check_apart(const pybind11::array& array, const char* name, const pybind11::array& other,
                        const char* other_name) {
    const auto [begin, end] = extent_of(array);
    const auto [other_begin, other_end] = extent_of(other);
    if (begin < other_end && other_begin < end)
        throw pybind11::value_error(std::string(name) + " must not overlap " + other_name);
}

}  // namespace tandem
