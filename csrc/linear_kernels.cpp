#include "linear_kernels.h"

#include "cpu_features.h"

namespace tandem {

const LinearKernels& linear_kernels() {
#if defined(__x86_64__)
    switch (cpu_path()) {
        case CpuPath::amx:
            return kAmxLinearKernels;
        case CpuPath::avx512_vnni:
            return kAvx512VnniLinearKernels;
        case CpuPath::avx512:
            return kAvx512LinearKernels;
        case CpuPath::avx2_vnni:
            return kAvx2VnniLinearKernels;
        case CpuPath::avx2:
            return kAvx2LinearKernels;
        case CpuPath::generic:
            break;
    }
#endif
    return kGenericLinearKernels;
}

}  // namespace tandem
