#include "linear_kernels_impl.h"

const tandem::LinearKernels tandem::kGenericLinearKernels = tandem::kLinearKernels;
