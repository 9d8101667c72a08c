#include "elementwise_kernels_impl.h"

const tandem::ElementwiseKernels tandem::kAvx2ElementwiseKernels = tandem::kElementwiseKernels;
