#include "penalties.h"

#include <cstddef>

namespace tandem {
namespace {

constexpr uint32_t kInPrompt = uint32_t{1} << 31;  // the lower bits count occurrences in the output

float penalised(float logit, uint32_t mark, const Penalties& penalties) {
    const auto occurrences = static_cast<float>(mark & ~kInPrompt);
    logit = logit > 0 ? logit / penalties.repetition : logit * penalties.repetition;
    logit -= penalties.frequency * occurrences;
    return occurrences > 0 ? logit - penalties.presence : logit;
}

}  // namespace

bool apply_penalties(float* logits, int64_t vocab, const Penalties& penalties, const History& history,
                     std::vector<uint32_t>& marks) {
    if (!history.within(vocab)) return false;
    for (int64_t i = 0; i < history.length; ++i) {
        uint32_t& mark = marks[static_cast<size_t>(history.ids[i])];
        if (i < history.prompt_length)
            mark |= kInPrompt;
        else
            ++mark;
    }
    // Clearing a token's mark when it is first met does each distinct token once and leaves the marks as they
    // were.
    for (const int32_t* id = history.ids; id != history.ids + history.length; ++id) {
        uint32_t& mark = marks[static_cast<size_t>(*id)];
        if (mark == 0) continue;
        logits[*id] = penalised(logits[*id], mark, penalties);
        mark = 0;
    }
    return true;
}

}  // namespace tandem
