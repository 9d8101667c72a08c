#include "attention_kernels.h"

#include "cpu_features.h"

namespace tandem {

const AttentionKernels& attention_kernels() {
#if defined(__x86_64__)
    switch (cpu_path()) {
        case CpuPath::avx512:
            return kAvx512AttentionKernels;
        case CpuPath::avx2:
            return kAvx2AttentionKernels;
        case CpuPath::generic:
            break;
    }
#endif
    return kGenericAttentionKernels;
}

}  // namespace tandem
