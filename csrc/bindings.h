// What the files of bindings share.
#pragma once

#include <pybind11/pybind11.h>

namespace tandem {

void register_attention(pybind11::module_& module);
void register_cached_attention(pybind11::module_& module);
void register_elementwise(pybind11::module_& module);
void register_linear(pybind11::module_& module);
void register_program(pybind11::module_& module);
void register_sampling(pybind11::module_& module);

}  // namespace tandem
