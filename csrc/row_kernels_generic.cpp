#include "row_kernels_impl.h"

const tandem::RowKernels tandem::kGenericRowKernels = tandem::kRowKernels;
