#include "logit_edits.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "candidates.h"
#include "parallel.h"
#include "penalties.h"
#include "row_kernels.h"

namespace tandem {
namespace {

constexpr float kBanned = -std::numeric_limits<float>::infinity();

// One row's edits, read once: all that is applied has been held against the scores.
struct RowEdits {
    float* scores;
    int64_t vocab;
    History history;  // empty where nothing reads it
    float repetition_penalty;
    int64_t ngram_size;
    const int32_t* bias_ids;
    const float* bias_values;
    int64_t biases;
    int64_t forced;
    const int32_t* mask;  // null: none

    // What there is to read, for the choice of a number of threads.
    int64_t work() const { return history.length + biases + (forced >= 0 || mask != nullptr ? vocab : 0); }
};

[[noreturn]] void refuse(const std::string& what, int64_t row) {
    throw std::invalid_argument(what + " in row " + std::to_string(row));
}

[[noreturn]] void refuse_token(const char* field, int64_t id, int64_t vocab, int64_t row) {
    refuse(std::string(field) + " must be below the vocabulary of " + std::to_string(vocab) + ", got " +
               std::to_string(id),
           row);
}

// The caller's arrays may have changed since they were checked: whatever they hold, nothing outside them is
// read.
RowEdits edits_of_row(const Scores& scores, const LogitEdits& e, int64_t index) {
    const int64_t row = e.rows[index];
    if (row < 0 || row >= scores.rows)
        throw std::invalid_argument("rows must be below the " + std::to_string(scores.rows) +
                                    " rows of the scores, got " + std::to_string(row));
    RowEdits r{};
    r.scores = scores.row(row);
    r.vocab = scores.vocab;
    r.repetition_penalty = e.repetition_penalty[index];
    r.ngram_size = e.no_repeat_ngram_size[index];
    if (r.repetition_penalty != 1.0f || r.ngram_size > 0) r.history = e.histories.of(index);
    const int64_t begin = std::clamp<int64_t>(e.bias_offsets[index], 0, e.biases);
    r.bias_ids = e.bias_ids + begin;
    r.bias_values = e.bias_values + begin;
    r.biases = std::clamp<int64_t>(e.bias_offsets[index + 1], begin, e.biases) - begin;
    r.forced = e.forced[index];
    const int64_t mask = e.mask[index];
    if (mask >= e.num_masks) refuse("mask must be a row of masks, got " + std::to_string(mask), row);
    if (mask >= 0) r.mask = e.masks + mask * e.mask_words;
    return r;
}

void check_tokens(const RowEdits& r, int64_t mask_words, int64_t row) {
    const auto inside = [&](int64_t id) { return 0 <= id && id < r.vocab; };
    for (int64_t i = 0; i < r.biases; ++i)
        if (!inside(r.bias_ids[i])) refuse_token("bias_ids", r.bias_ids[i], r.vocab, row);
    if (r.forced >= r.vocab) refuse_token("forced", r.forced, r.vocab, row);
    if (!r.history.within(r.vocab)) {
        const int32_t* end = r.history.ids + r.history.length;
        refuse_token("history_ids", *std::find_if_not(r.history.ids, end, inside), r.vocab, row);
    }
    if (r.mask != nullptr && mask_words < (r.vocab + 31) / 32)
        refuse("masks must have a bit for each of " + std::to_string(r.vocab) + " tokens, got " +
                   std::to_string(mask_words) + " words",
               row);
}

void ban_repeated_ngrams(const RowEdits& r) {
    const int64_t before = r.ngram_size - 1;  // tokens of an n-gram before its last
    const int32_t* ids = r.history.ids;
    const int32_t* tail = ids + r.history.length - before;
    for (int64_t i = 0; i + before < r.history.length; ++i)
        if (std::equal(ids + i, ids + i + before, tail)) r.scores[ids[i + before]] = kBanned;
}

// A row that holds NaN stays as it is, for others to find.
void force(const RowEdits& r, Scratch& scratch) {
    if (row_kernels().scan(r.scores, r.vocab, scratch.blocks.data()).has_nan) return;
    std::fill_n(r.scores, r.vocab, kBanned);
    r.scores[r.forced] = 0.0f;
}

void apply(const RowEdits& r) {
    Scratch& scratch = scratch_for(r.vocab);
    if (r.repetition_penalty != 1.0f)
        apply_penalties(r.scores, r.vocab, {r.repetition_penalty, 0.0f, 0.0f}, r.history, scratch.marks);
    if (r.ngram_size > 0 && r.ngram_size <= r.history.length) ban_repeated_ngrams(r);
    for (int64_t i = 0; i < r.biases; ++i) r.scores[r.bias_ids[i]] += r.bias_values[i];
    if (r.forced >= 0) force(r, scratch);
    if (r.mask != nullptr) row_kernels().keep_allowed(r.scores, r.vocab, r.mask);
}

}  // namespace

void edit_logits(const Scores& scores, const LogitEdits& edits, int num_threads) {
    std::vector<RowEdits> rows;
    std::vector<bool> named(static_cast<size_t>(scores.rows));
    int64_t work = 0;
    for (int64_t i = 0; i < edits.count; ++i) {
        rows.push_back(edits_of_row(scores, edits, i));
        const int64_t row = edits.rows[i];
        if (named[static_cast<size_t>(row)])
            throw std::invalid_argument("rows must be distinct, got " + std::to_string(row) + " twice");
        named[static_cast<size_t>(row)] = true;
        check_tokens(rows.back(), edits.mask_words, row);
        work += rows.back().work();
    }
    parallel_for(edits.count, threads_worth(work, num_threads),
                 [&](int64_t i) { apply(rows[static_cast<size_t>(i)]); });
}

}  // namespace tandem
