#include "elementwise_kernels.h"

#include "cpu_features.h"

namespace tandem {

const ElementwiseKernels& elementwise_kernels() {
#if defined(__x86_64__)
    return on_this_cpu(kGenericElementwiseKernels, kAvx2ElementwiseKernels, kAvx512ElementwiseKernels);
#else
    return kGenericElementwiseKernels;
#endif
}

}  // namespace tandem
