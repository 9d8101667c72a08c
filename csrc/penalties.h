// Penalties for tokens that a sequence already holds, with vLLM's meanings.
#pragma once

#include <cstdint>
#include <vector>

#include "history.h"

namespace tandem {

struct Penalties {
    float repetition;  // divides a positive logit, multiplies a negative one, of any token seen; 1 = off
    float presence;    // subtracted from the logit of a token in the output; 0 = off
    float frequency;   // subtracted once an occurrence in the output; 0 = off

    bool any() const { return repetition != 1.0f || presence != 0.0f || frequency != 0.0f; }
};

// Edits logits in place. marks: one zero a token of the vocabulary, zero again on return.
// Returns false, with nothing edited, if an id is outside the vocabulary.
bool apply_penalties(float* logits, int64_t vocab, const Penalties& penalties, const History& history,
                     std::vector<uint32_t>& marks);

}  // namespace tandem
