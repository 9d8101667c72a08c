#include "cached_attention_kernels_impl.h"

const tandem::CachedAttentionKernels tandem::kGenericCachedAttentionKernels = tandem::kCachedAttentionKernels;
