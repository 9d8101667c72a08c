#include "sampling.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "candidates.h"
#include "parallel.h"
#include "penalties.h"
#include "philox.h"
#include "row_kernels.h"

namespace tandem {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// As in vLLM: a temperature so small that dividing by it would overflow is greedy.
constexpr float kGreedyBelow = 1e-5f;

struct Row {
    const float* logits;
    int64_t vocab;
    const float* block_max;
    int64_t blocks;
    float max;
};

struct Params {
    float temperature;
    int64_t top_k;
    double top_p, min_p, typical_p;
    Penalties penalties;
    int64_t seed, position;

    bool greedy() const { return temperature < kGreedyBelow; }
    bool filtered() const { return top_k > 0 || top_p < 1 || min_p > 0 || typical_p < 1; }
};

Params params_of(const SamplingRequests& r, int64_t row) {
    return {r.temperature[row],
            r.top_k[row],
            static_cast<double>(r.top_p[row]),
            static_cast<double>(r.min_p[row]),
            static_cast<double>(r.typical_p[row]),
            {r.repetition_penalty[row], r.presence_penalty[row], r.frequency_penalty[row]},
            r.seed[row],
            r.position[row]};
}

// The one pass every row takes: its maximum, the maxima of its blocks, and whether it may be sampled from at
// all.
RowError scan(const float* logits, int64_t vocab, Scratch& scratch, Row& row) {
    const RowMax found = row_kernels().scan(logits, vocab, scratch.blocks.data());
    row = {logits, vocab, scratch.blocks.data(), (vocab + kBlock - 1) / kBlock, found.max};
    if (found.has_nan) return RowError::has_nan;
    if (found.max == kInfinity) return RowError::has_infinity;
    return found.max == -kInfinity ? RowError::nothing_left : RowError::none;
}

// Penalties work on a copy, for the log-probabilities are those of the raw logits.
RowError penalise(const Params& params, const History& history, Scratch& scratch, Row& row) {
    if (!params.penalties.any() || history.length == 0) return RowError::none;
    float* edited = scratch.logits.data();
    std::copy(row.logits, row.logits + row.vocab, edited);
    if (!apply_penalties(edited, row.vocab, params.penalties, history, scratch.marks))
        return RowError::bad_history;
    return scan(edited, row.vocab, scratch, row);
}

int32_t argmax(const Row& row) {
    const int64_t block = std::find(row.block_max, row.block_max + row.blocks, row.max) - row.block_max;
    const float* begin = row.logits + block * kBlock;
    return static_cast<int32_t>(std::find(begin, row.logits + row.vocab, row.max) - row.logits);
}

// The smallest logit whose token has at least `weight` times the probability of the best one.
float logit_of_weight(const Row& row, const Params& params, double weight) {
    const double logit =
        static_cast<double>(row.max) + static_cast<double>(params.temperature) * std::log(weight);
    return static_cast<float>(std::max(logit, static_cast<double>(-FLT_MAX)));
}

// What remains to be chosen from, and the sum of all weights that top_p is a share of.
struct Survivors {
    Candidates candidates;
    double total;
};

// min_p and top_k at once, as a bound on the logits: blocks that do not reach it are not looked at again.
// With top_p alone the bound is a logit below which all tokens together lack the mass to be needed.
Survivors keep_likely(const Row& row, const Params& params, Scratch& scratch) {
    const float scale = 1.0f / params.temperature;
    float bound = params.min_p > 0 ? logit_of_weight(row, params, params.min_p) : -FLT_MAX;
    double total = 0;
    if (params.top_k > 0) {
        bound = std::max(bound, top_k_bound(row.block_max, row.blocks, row.max, params.top_k));
    } else if (params.min_p <= 0 && params.top_p < 1) {
        total = row_kernels().exp_sum_blocks(row.logits, row.vocab, row.max, scale, scratch.values.data());
        const double needed = 0.99 * (1 - params.top_p) * total / static_cast<double>(row.vocab);
        bound = logit_of_weight(row, params, needed);
    }
    Candidates kept = {scratch.values.data(), scratch.ids.data(), 0};
    kept.count = row_kernels().collect(row.logits, nullptr, row.vocab, row.block_max, bound, kInfinity,
                                       kept.values, kept.ids);
    if (params.top_k > 0) keep_top_k(kept, params.top_k, bound, row.max, scratch);
    exponentiate(kept, row.max, scale);
    if (total <= 0) total = row_kernels().sum_blocks(kept.values, kept.count, scratch.blocks.data());
    return {kept, total};
}

// The stages of a choice.
int32_t choose(const Row& row, const Params& params, Scratch& scratch) {
    if (params.greedy()) return argmax(row);
    const double u = uniform(params.seed, params.position);
    if (!params.filtered())
        return draw_from_row(row.logits, row.vocab, row.max, 1.0f / params.temperature, u, scratch);
    auto [candidates, total] = keep_likely(row, params, scratch);
    if (params.top_p < 1) keep_nucleus(candidates, params.top_p, total, scratch);
    if (params.typical_p < 1)
        keep_typical(candidates, params.typical_p, row.logits, row.max, 1.0f / params.temperature, scratch);
    return draw(candidates, u, scratch);
}

// Log-probabilities are those of the raw logits, before penalties and temperature.
struct RawLogprobs {
    const float* logits;
    float log_sum_exp;

    float of(float logit) const { return logit - log_sum_exp; }
};

RawLogprobs raw_logprobs(const Row& row, Scratch& scratch) {
    const double sum =
        row_kernels().exp_sum_blocks(row.logits, row.vocab, row.max, 1.0f, scratch.values.data());
    return {row.logits, static_cast<float>(static_cast<double>(row.max) + std::log(sum))};
}

void report_top(const Row& row, const RawLogprobs& raw, int64_t n, Scratch& scratch, float* logprobs,
                int64_t* ids) {
    if (n == 0) return;
    const float bound = top_k_bound(row.block_max, row.blocks, row.max, n);
    Candidates top = {scratch.values.data(), scratch.ids.data(), 0};
    top.count = row_kernels().collect(row.logits, nullptr, row.vocab, row.block_max, bound, kInfinity,
                                      top.values, top.ids);
    keep_top_k(top, n, bound, row.max, scratch);
    sort_descending(top);
    for (int64_t i = 0; i < top.count; ++i) {
        logprobs[i] = raw.of(top.values[i]);
        ids[i] = top.ids[i];
    }
}

// 1 + how many logits are larger, or equal with a lower id.
int32_t rank_of(const float* logits, int64_t vocab, int64_t token) {
    const float logit = logits[token];
    const float next = next_above(logit);
    return static_cast<int32_t>(1 + row_kernels().count_at_least(logits, token, logit) +
                                row_kernels().count_at_least(logits + token, vocab - token, next));
}

void clear(const SamplingResults& results, int64_t row) {
    results.token_ids[row] = -1;
    results.logprobs[row] = std::numeric_limits<float>::quiet_NaN();
    results.ranks[row] = 0;
    std::fill_n(results.top_logprobs + row * results.top_columns, results.top_columns, -kInfinity);
    std::fill_n(results.top_ids + row * results.top_columns, results.top_columns, int64_t{-1});
}

RowError sample_row(const Logits& logits, const SamplingRequests& requests, const SamplingResults& results,
                    int64_t index) {
    Scratch& scratch = scratch_for(logits.vocab);
    const Params params = params_of(requests, index);
    const int64_t num_logprobs = std::min<int64_t>(requests.num_logprobs[index], results.top_columns);
    Row row;
    RowError error = scan(logits.data + index * logits.stride, logits.vocab, scratch, row);
    if (error != RowError::none) return error;

    RawLogprobs raw = {row.logits, 0};
    if (num_logprobs >= 0) {
        raw = raw_logprobs(row, scratch);
        report_top(row, raw, num_logprobs, scratch, results.top_logprobs + index * results.top_columns,
                   results.top_ids + index * results.top_columns);
    }
    error = penalise(params, requests.histories.of(index), scratch, row);
    if (error != RowError::none) return error;
    const int32_t token = choose(row, params, scratch);
    results.token_ids[index] = token;
    if (num_logprobs < 0) return RowError::none;
    results.logprobs[index] = raw.of(raw.logits[token]);
    results.ranks[index] = rank_of(raw.logits, row.vocab, token);
    return RowError::none;
}

}  // namespace

const char* message_of(RowError error) {
    switch (error) {
        case RowError::has_nan:
            return "the logits hold NaN";
        case RowError::has_infinity:
            return "the logits hold +inf";
        case RowError::nothing_left:
            return "no token is left to choose: every logit is -inf";
        case RowError::bad_history:
            return "the history holds a token id outside the vocabulary";
        case RowError::none:
            break;
    }
    return nullptr;
}

void sample(const Logits& logits, const SamplingRequests& requests, const SamplingResults& results,
            int num_threads) {
    parallel_for(logits.rows, threads_worth(logits.rows * logits.vocab, num_threads), [&](int64_t row) {
        clear(results, row);
        results.errors[row] = sample_row(logits, requests, results, row);
        if (results.errors[row] != RowError::none) clear(results, row);
    });
}

void top_k(const Logits& scores, int64_t k, float* values, int64_t* ids, int num_threads) {
    parallel_for(scores.rows, threads_worth(scores.rows * scores.vocab, num_threads), [&](int64_t index) {
        Scratch& scratch = scratch_for(scores.vocab);
        Row row;
        const RowError error = scan(scores.data + index * scores.stride, scores.vocab, scratch, row);
        const bool broken = error == RowError::has_nan || error == RowError::has_infinity;
        std::fill_n(values + index * k, k, broken ? std::numeric_limits<float>::quiet_NaN() : -kInfinity);
        std::fill_n(ids + index * k, k, int64_t{0});
        if (error == RowError::none)
            report_top(row, {row.logits, 0}, k, scratch, values + index * k, ids + index * k);
    });
}

}  // namespace tandem
