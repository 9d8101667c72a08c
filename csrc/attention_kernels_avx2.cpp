#include "attention_kernels_impl.h"

const tandem::AttentionKernels tandem::kAvx2AttentionKernels = tandem::kAttentionKernels;
