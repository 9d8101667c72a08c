#include "cached_attention_kernels.h"

#include "cpu_features.h"

namespace tandem {

const CachedAttentionKernels& cached_attention_kernels() {
#if defined(__x86_64__)
    switch (cpu_path()) {
        case CpuPath::avx512:
            return kAvx512CachedAttentionKernels;
        case CpuPath::avx2:
            return kAvx2CachedAttentionKernels;
        case CpuPath::generic:
            break;
    }
#endif
    return kGenericCachedAttentionKernels;
}

}  // namespace tandem
