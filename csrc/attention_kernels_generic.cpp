#include "attention_kernels_impl.h"

const tandem::AttentionKernels tandem::kGenericAttentionKernels = tandem::kAttentionKernels;
