#include "linear_kernels_impl.h"

const tandem::LinearKernels tandem::kAvx2LinearKernels = tandem::kLinearKernels;
