#include "elementwise_kernels_impl.h"

const tandem::ElementwiseKernels tandem::kAvx512ElementwiseKernels = tandem::kElementwiseKernels;
