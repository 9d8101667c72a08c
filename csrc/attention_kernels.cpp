#include "attention_kernels.h"

#include "cpu_features.h"

namespace tandem {

const AttentionKernels& attention_kernels() {
#if defined(__x86_64__)
    return on_this_cpu(kGenericAttentionKernels, kAvx2AttentionKernels, kAvx512AttentionKernels);
#else
    return kGenericAttentionKernels;
#endif
}

}  // namespace tandem
