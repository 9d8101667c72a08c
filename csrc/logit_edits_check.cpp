#include <algorithm>
#include <cmath>
#include <vector>

#include "column_check.h"
#include "logit_edits.h"

namespace tandem {
namespace {

void check_rows(const LogitEdits& e) {
    check_column("rows", e.rows, e.count, "at least 0", [](int64_t x) { return x >= 0; });
    std::vector<int64_t> sorted(e.rows, e.rows + e.count);
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end())
        throw std::invalid_argument("rows must be distinct, got " + std::to_string(*twice) + " twice");
}

void check_biases(const LogitEdits& e) {
    bool fits = e.bias_offsets[0] == 0 && e.bias_offsets[e.count] == e.biases;
    for (int64_t i = 0; i < e.count; ++i) fits = fits && e.bias_offsets[i] <= e.bias_offsets[i + 1];
    if (!fits)
        throw std::invalid_argument(
            "bias_offsets must start at 0, never fall, and end at the length of bias_ids");
    for (int64_t i = 0; i < e.count; ++i)
        for (int64_t j = e.bias_offsets[i]; j < e.bias_offsets[i + 1]; ++j) {
            const float value = e.bias_values[j];
            if (e.bias_ids[j] < 0) refuse("bias_ids", "at least 0", e.bias_ids[j], e.rows[i]);
            if (std::isnan(value) || (std::isinf(value) && value > 0))
                refuse("bias_values", "finite or -inf", static_cast<double>(value), e.rows[i]);
        }
}

}  // namespace

void check(const LogitEdits& e) {
    check_rows(e);
    check_column(
        "repetition_penalty", e.repetition_penalty, e.count, "finite and above 0",
        [](float x) { return x > 0 && std::isfinite(x); }, e.rows);
    check_column(
        "no_repeat_ngram_size", e.no_repeat_ngram_size, e.count, "at least 1, or 0 for none",
        [](int32_t x) { return x >= 0; }, e.rows);
    check_biases(e);
    check_column(
        "forced", e.forced, e.count, "a token, or -1 for none", [](int32_t x) { return x >= -1; }, e.rows);
    check_column(
        "mask", e.mask, e.count, "a row of masks, or -1 for none",
        [&](int32_t x) { return x >= -1 && x < e.num_masks; }, e.rows);
    e.histories.check(e.count, e.rows);
}

}  // namespace tandem
