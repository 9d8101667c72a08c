#include "cached_attention_kernels.h"

#include "cpu_features.h"

namespace tandem {

const CachedAttentionKernels& cached_attention_kernels() {
#if defined(__x86_64__)
    return on_this_cpu(kGenericCachedAttentionKernels, kAvx2CachedAttentionKernels,
                       kAvx512CachedAttentionKernels);
#else
    return kGenericCachedAttentionKernels;
#endif
}

}  // namespace tandem
