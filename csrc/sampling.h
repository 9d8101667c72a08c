// Draws the next token of each row of logits; the meanings of the parameters are vLLM's (see
// kernels/sampling.py).
//
// What limits it is reading a row once, 4 bytes a token of the vocabulary: greedy, top_k and min_p do little
// else. Unfiltered draws, top_p or typical_p alone and log-probabilities also take an exponential a token,
// bound by arithmetic.
#pragma once

#include <cstdint>

#include "history.h"
#include "scores.h"

namespace tandem {

// One entry a row. Histories are read only for rows with a penalty.
struct SamplingRequests {
    int64_t rows;
    const float *temperature, *top_p, *min_p, *typical_p;
    const int32_t* top_k;
    const float *repetition_penalty, *presence_penalty, *frequency_penalty;
    const int64_t *seed, *position;
    const int32_t* num_logprobs;
    Histories histories;
};

// Throws std::invalid_argument with one sentence that names the field, the row and what is allowed.
void check(const SamplingRequests& requests);

enum class RowError : uint8_t { none, has_nan, has_infinity, nothing_left, bad_history };

// A sentence for an error, null for none.
const char* message_of(RowError error);

// One entry a row; top_* have `top_columns` a row, padded with -inf and -1.
struct SamplingResults {
    int64_t* token_ids;  // -1 where there is an error
    float* logprobs;     // NaN where not asked for
    int32_t* ranks;      // from 1; 0 where not asked for
    float* top_logprobs;
    int64_t* top_ids;
    int64_t top_columns;
    RowError* errors;
};

// Whole rows are the tasks: one is done by one thread, so the number of threads cannot change a result.
void sample(const Logits& logits, const SamplingRequests& requests, const SamplingResults& results,
            int num_threads);

// The k largest of each row, largest first, lower ids first among equals; values and ids are (rows, k). What
// is -inf is left out: behind the others are -inf and id 0. A row with NaN or +inf gets NaN.
void top_k(const Logits& scores, int64_t k, float* values, int64_t* ids, int num_threads);

}  // namespace tandem
