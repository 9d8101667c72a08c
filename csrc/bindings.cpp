// The Python face of the core: checks numpy arrays, releases the GIL, calls. Only this file and its sisters
// bindings_*.cpp know pybind11.
#include "bindings.h"

#include <pybind11/pybind11.h>

#include "cpu_features.h"

PYBIND11_MODULE(_C, module) {
    module.attr("cpu_path") = tandem::name_of(tandem::cpu_path());
    tandem::register_attention(module);
    tandem::register_cached_attention(module);
    tandem::register_elementwise(module);
    tandem::register_linear(module);
    tandem::register_program(module);
    tandem::register_sampling(module);
}
