#include <cmath>

#include "column_check.h"
#include "sampling.h"

namespace tandem {

void check(const SamplingRequests& r) {
    const auto penalty = [](float x) { return x >= -2 && x <= 2; };
    check_column("temperature", r.temperature, r.rows, "finite and at least 0",
                 [](float x) { return x >= 0 && std::isfinite(x); });
    check_column("top_k", r.top_k, r.rows, "at least 1, or 0 for no limit", [](int32_t x) { return x >= 0; });
    check_column("top_p", r.top_p, r.rows, "above 0 and at most 1", [](float x) { return x > 0 && x <= 1; });
    check_column("min_p", r.min_p, r.rows, "from 0 to 1", [](float x) { return x >= 0 && x <= 1; });
    check_column("typical_p", r.typical_p, r.rows, "above 0 and at most 1",
                 [](float x) { return x > 0 && x <= 1; });
    check_column("repetition_penalty", r.repetition_penalty, r.rows, "finite and above 0",
                 [](float x) { return x > 0 && std::isfinite(x); });
    check_column("presence_penalty", r.presence_penalty, r.rows, "from -2 to 2", penalty);
    check_column("frequency_penalty", r.frequency_penalty, r.rows, "from -2 to 2", penalty);
    check_column("position", r.position, r.rows, "at least 0", [](int64_t x) { return x >= 0; });
    check_column("num_logprobs", r.num_logprobs, r.rows, "at least 0, or -1 for none",
                 [](int32_t x) { return x >= -1; });
    r.histories.check(r.rows);
}

}  // namespace tandem
