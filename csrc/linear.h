// Linear layers over packed weights, shared out among a team.
#pragma once

#include "linear_kernels.h"
#include "parallel.h"

namespace tandem {

// Bytes behind the last row of ByteRows that kernels may read.
constexpr int64_t kByteSlack = 64;

// The bytes' width, and the groups their sums are of, that a weight asks of its rows.
int64_t byte_stride(const PackedMatrix& weight);
int64_t byte_groups(const PackedMatrix& weight);

// Rounds rows (rows, width) to bytes. To be called by every member of the team, as all below.
void quantize_rows(const FloatRows& x, int64_t rows, int64_t width, int64_t group, const ByteRows& out,
                   Team& team);

// Every output of `rows` rows.
void linear(const LinearBatch& batch, int64_t rows, Team& team);

}  // namespace tandem
