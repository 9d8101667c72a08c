// The transpose of a matrix and, from the same pass over it, the sums of its columns.
#pragma once

#include <cstdint>

namespace tandem {

// `to` (columns, rows) becomes the transpose of `from` (rows, columns), whose rows begin `stride` floats
// apart. `sums` (columns) becomes the sums over the rows unless it is null; they do not depend on the number
// of threads.
void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to, float* sums,
               int num_threads);

}  // namespace tandem
