// Scores made log-probabilities, as beam search adds them up.
#pragma once

#include "scores.h"

namespace tandem {

// In place. A row with NaN or +inf, or of nothing but -inf, becomes NaN. A row is done by one thread, with
// the same bits on every CPU path. Two passes read the row and one writes it; the second, an exponential a
// token, is bound by arithmetic.
void log_softmax(const Scores& scores, int num_threads);

}  // namespace tandem
