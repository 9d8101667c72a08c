#include "linear_kernels_impl.h"

const tandem::LinearKernels tandem::kAvx512LinearKernels = tandem::kLinearKernels;
