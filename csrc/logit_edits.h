// What rows of scores must not or need not say before a choice is made from them: penalties for repetition,
// biases and bans, a forced token, a mask of what a grammar allows.
//
// Only the rows named are touched. A penalty, an n-gram size and a bias cost what their ids do, at random
// places of the row; forcing and masking pass once over the row, bound by memory.
#pragma once

#include <cstdint>

#include "history.h"
#include "scores.h"

namespace tandem {

// One entry a row that is edited; what is off costs nothing. In the order they are applied:
struct LogitEdits {
    int64_t count;
    const int64_t* rows;              // of the scores; distinct
    const float* repetition_penalty;  // divides a positive score, multiplies a negative one, of any token of
                                      // the history; 1 = off
    const int32_t* no_repeat_ngram_size;  // bans what completes an n-gram that the history holds; 0 = off
    const int64_t* bias_offsets;          // count + 1: a row's first bias
    const int32_t* bias_ids;
    const float* bias_values;  // added; -inf bans
    int64_t biases;
    const int32_t* forced;  // the one token left, with score 0, unless the row holds NaN; -1 = off
    const int32_t* mask;    // which of masks; -1 = off
    const int32_t* masks;   // (num_masks, mask_words): bit i % 32 of word i / 32 allows token i
    int64_t num_masks, mask_words;
    Histories histories;
};

// Throws std::invalid_argument with one sentence that names the field and the row.
void check(const LogitEdits& edits);

// In place. Throws the same, before anything is written, if a row or a token lies outside the scores. The
// arrays of checked edits may change between calls, and not during one. A row is done by one thread.
void edit_logits(const Scores& scores, const LogitEdits& edits, int num_threads);

}  // namespace tandem
