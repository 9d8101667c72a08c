#include "elementwise_kernels.h"

#include "cpu_features.h"

namespace tandem {

const ElementwiseKernels& elementwise_kernels() {
#if defined(__x86_64__)
    switch (cpu_path()) {
        case CpuPath::avx512:
            return kAvx512ElementwiseKernels;
        case CpuPath::avx2:
            return kAvx2ElementwiseKernels;
        case CpuPath::generic:
            break;
    }
#endif
    return kGenericElementwiseKernels;
}

}  // namespace tandem
