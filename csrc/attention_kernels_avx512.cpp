#include "attention_kernels_impl.h"

const tandem::AttentionKernels tandem::kAvx512AttentionKernels = tandem::kAttentionKernels;
