#include "row_kernels.h"

#include "cpu_features.h"

namespace tandem {

const RowKernels& row_kernels() {
#if defined(__x86_64__)
    switch (cpu_path()) {
        case CpuPath::avx512:
            return kAvx512RowKernels;
        case CpuPath::avx2:
            return kAvx2RowKernels;
        case CpuPath::generic:
            break;
    }
#endif
    return kGenericRowKernels;
}

}  // namespace tandem
