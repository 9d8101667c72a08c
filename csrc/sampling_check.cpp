#include <cmath>
#include <stdexcept>
#include <string>

#include "sampling.h"

namespace tandem {
namespace {

[[noreturn]] void refuse(const char* field, const char* allowed, double value, int64_t row) {
    std::string shown = std::to_string(value);
    if (shown.find('.') != std::string::npos) shown.erase(shown.find_last_not_of('0') + 1);
    if (shown.back() == '.') shown.pop_back();
    throw std::invalid_argument(std::string(field) + " must be " + allowed + ", got " + shown + " in row " +
                                std::to_string(row));
}

template <class T, class Allowed>
void check_column(const char* field, const T* values, int64_t rows, const char* allowed, Allowed is_allowed) {
    for (int64_t row = 0; row < rows; ++row)
        if (!is_allowed(values[row])) refuse(field, allowed, static_cast<double>(values[row]), row);
}

void check_history(const SamplingRequests& r) {
    const char* rule = "history_offsets must start at 0, never fall, and end at the length of history_ids";
    bool fits = r.history_offsets[0] == 0 && r.history_offsets[r.rows] == r.history_length;
    for (int64_t row = 0; row < r.rows; ++row)
        fits = fits && r.history_offsets[row] <= r.history_offsets[row + 1];
    if (!fits) throw std::invalid_argument(rule);
    for (int64_t row = 0; row < r.rows; ++row) {
        const int64_t length = r.history_offsets[row + 1] - r.history_offsets[row];
        if (r.prompt_lengths[row] < 0 || r.prompt_lengths[row] > length)
            refuse("prompt_lengths", "from 0 to the length of the row's history", r.prompt_lengths[row], row);
    }
}

}  // namespace

void check(const SamplingRequests& r) {
    const auto penalty = [](float x) { return x >= -2 && x <= 2; };
    check_column("temperature", r.temperature, r.rows, "finite and at least 0",
                 [](float x) { return x >= 0 && std::isfinite(x); });
    check_column("top_k", r.top_k, r.rows, "at least 1, or 0 for no limit", [](int32_t x) { return x >= 0; });
    check_column("top_p", r.top_p, r.rows, "above 0 and at most 1", [](float x) { return x > 0 && x <= 1; });
    check_column("min_p", r.min_p, r.rows, "from 0 to 1", [](float x) { return x >= 0 && x <= 1; });
    check_column("repetition_penalty", r.repetition_penalty, r.rows, "finite and above 0",
                 [](float x) { return x > 0 && std::isfinite(x); });
    check_column("presence_penalty", r.presence_penalty, r.rows, "from -2 to 2", penalty);
    check_column("frequency_penalty", r.frequency_penalty, r.rows, "from -2 to 2", penalty);
    check_column("position", r.position, r.rows, "at least 0", [](int64_t x) { return x >= 0; });
    check_column("num_logprobs", r.num_logprobs, r.rows, "at least 0, or -1 for none",
                 [](int32_t x) { return x >= -1; });
    check_history(r);
}

}  // namespace tandem
