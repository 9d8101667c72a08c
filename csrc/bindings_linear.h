// What the bindings of linear layers share.
#pragma once

#include <string>

#include "linear_kernels.h"

namespace tandem {

// none, relu, gelu, gelu_new or silu. Raises Python's ValueError for another name.
ActivationKind activation_named(const std::string& name);

}  // namespace tandem
