#include "row_kernels_impl.h"

const tandem::RowKernels tandem::kAvx512RowKernels = tandem::kRowKernels;
