#include "linear_kernels_impl.h"

const tandem::LinearKernels tandem::kAvx2VnniLinearKernels = tandem::kLinearKernels;
