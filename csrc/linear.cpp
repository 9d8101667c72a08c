#include "linear.h"

#include <algorithm>

namespace tandem {
namespace {

// Rows of x that are handled together stay in the second-level cache while chunk after chunk of weights
// passes by.
constexpr int64_t kBytesAtOnce = int64_t{1} << 20;
constexpr int64_t kRowStep = 96;  // whole tiles of every kernel
constexpr int64_t kQuantizedAtOnce = 4;

int64_t rows_at_once(const LinearBatch& batch) {
    const int64_t row = batch.x.data != nullptr ? batch.weight->inputs * 4 : batch.bytes.stride;
    return std::clamp(kBytesAtOnce / std::max<int64_t>(row, 1) / kRowStep, int64_t{1}, int64_t{4}) * kRowStep;
}

Upcoming chunk_of(const PackedMatrix& weight, int64_t chunk) {
    return {weight.chunk(chunk), weight.chunk_bytes()};
}

Upcoming first_of(const PackedMatrix* weight, int64_t chunk) {
    return weight == nullptr || chunk >= weight->chunks() ? Upcoming{} : chunk_of(*weight, chunk);
}

}  // namespace

int64_t byte_stride(const PackedMatrix& weight) { return weight.depth(); }

int64_t byte_groups(const PackedMatrix& weight) {
    return weight.storage == Storage::int4 ? weight.depth() / weight.group : 1;
}

void quantize_rows(const FloatRows& x, int64_t rows, int64_t width, int64_t group, const ByteRows& out,
                   Team& team) {
    const LinearKernels& kernels = linear_kernels();
    team.for_each((rows + kQuantizedAtOnce - 1) / kQuantizedAtOnce, [&](int64_t task) {
        const int64_t end = std::min(rows, (task + 1) * kQuantizedAtOnce);
        for (int64_t row = task * kQuantizedAtOnce; row < end; ++row)
            kernels.quantize(x.data + row * x.stride, width, group, out, row);
    });
}

void linear(const LinearBatch& batch, int64_t rows, Team& team) {
    const LinearKernels& kernels = linear_kernels();
    const int64_t chunks = batch.weight->chunks(), block = rows_at_once(batch);
    const int64_t blocks = (rows + block - 1) / block;
    const int64_t tasks = blocks * chunks;
    team.for_each_ahead(tasks, [&](int64_t task, int64_t next) {
        const int64_t first = task / chunks * block;
        kernels.product(
            batch, first, std::min(block, rows - first), task % chunks,
            next < tasks ? chunk_of(*batch.weight, next % chunks) : first_of(batch.then, next - tasks));
    });
}

}  // namespace tandem
