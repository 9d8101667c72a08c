#include "log_softmax.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "candidates.h"
#include "parallel.h"
#include "row_kernels.h"

namespace tandem {
namespace {

void log_softmax_row(float* row, int64_t n, float* blocks) {
    const RowMax found = row_kernels().scan(row, n, blocks);
    if (found.has_nan || std::isinf(found.max)) {
        std::fill_n(row, n, std::numeric_limits<float>::quiet_NaN());
        return;
    }
    const double sum = row_kernels().exp_sum_blocks(row, n, found.max, 1.0f, blocks);
    const auto log_sum = static_cast<float>(std::log(sum));
    for (int64_t i = 0; i < n; ++i) row[i] = (row[i] - found.max) - log_sum;
}

}  // namespace

void log_softmax(const Scores& scores, int num_threads) {
    parallel_for(scores.rows, threads_worth(scores.rows * scores.vocab, num_threads), [&](int64_t row) {
        log_softmax_row(scores.row(row), scores.vocab, scratch_for(scores.vocab).blocks.data());
    });
}

}  // namespace tandem
