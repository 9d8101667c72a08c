#include "row_kernels_impl.h"

const tandem::RowKernels tandem::kAvx2RowKernels = tandem::kRowKernels;
