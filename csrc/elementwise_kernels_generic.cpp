#include "elementwise_kernels_impl.h"

const tandem::ElementwiseKernels tandem::kGenericElementwiseKernels = tandem::kElementwiseKernels;
