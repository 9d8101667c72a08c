#include "row_kernels.h"

#include "cpu_features.h"

namespace tandem {

const RowKernels& row_kernels() {
#if defined(__x86_64__)
    return on_this_cpu(kGenericRowKernels, kAvx2RowKernels, kAvx512RowKernels);
#else
    return kGenericRowKernels;
#endif
}

}  // namespace tandem
