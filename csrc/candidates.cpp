#include "candidates.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "row_kernels.h"

namespace tandem {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The search for a boundary stops when so few elements are left in doubt; they are then sorted.
constexpr int64_t kFew = 32;

// Weights below its exponential are 0.
constexpr float kLeastLogWeight = -87.0f;

// Integers in the order of the floats, so that a search by halves takes at most 32 steps whatever the values.
int64_t key_of(float value) {
    value += 0.0f;  // -0 equals 0 and must share its key
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

float value_of(int64_t key) {
    auto bits = static_cast<int32_t>(key);
    if (bits < 0) bits ^= 0x7fffffff;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The element at which the measure of all larger ones reaches a target is in [low, high).
struct Bracket {
    float low, high;
    Tally at_low, at_high;
    bool single_value;
};

// measure(t) tells the count and the mass of the elements >= t; measure(lowest) must reach the target.
template <class Measure>
Bracket narrow(Measure measure, float lowest, float highest, double target) {
    int64_t low = key_of(lowest);
    int64_t high = key_of(next_above(highest));
    Tally at_low = measure(lowest);
    Tally at_high = {0, 0};
    while (high - low > 1 && at_low.count - at_high.count > kFew) {
        const int64_t middle = low + (high - low) / 2;
        const Tally tally = measure(value_of(middle));
        const bool reached = tally.mass >= target;
        (reached ? low : high) = middle;
        (reached ? at_low : at_high) = tally;
    }
    return {value_of(low), value_of(high), at_low, at_high, high - low == 1};
}

// For requests of very many log-probabilities.
void sort_many(Candidates& c) {
    std::vector<std::pair<float, int32_t>> pairs;
    for (int64_t i = 0; i < c.count; ++i) pairs.emplace_back(-c.values[i], c.ids[i]);
    std::sort(pairs.begin(), pairs.end());
    for (int64_t i = 0; i < c.count; ++i) {
        c.values[i] = -pairs[static_cast<size_t>(i)].first;
        c.ids[i] = pairs[static_cast<size_t>(i)].second;
    }
}

// The candidates inside the bracket, best first.
Candidates boundary_of(const Candidates& c, const Bracket& bracket, Scratch& scratch) {
    Candidates boundary = {scratch.boundary_values.data(), scratch.boundary_ids.data(), 0};
    boundary.count = row_kernels().collect(c.values, c.ids, c.count, nullptr, bracket.low, bracket.high,
                                           boundary.values, boundary.ids);
    if (!bracket.single_value) sort_descending(boundary);
    return boundary;
}

// Drops what is smaller than the last to keep, and its equals of higher id.
void keep_through(Candidates& c, float last_value, int32_t last_id, bool has_equals_after) {
    c.count =
        row_kernels().collect(c.values, c.ids, c.count, nullptr, last_value, kInfinity, c.values, c.ids);
    if (!has_equals_after) return;
    int64_t kept = 0;
    for (int64_t i = 0; i < c.count; ++i) {
        c.values[kept] = c.values[i];
        c.ids[kept] = c.ids[i];
        kept += c.values[i] > last_value || c.ids[i] <= last_id ? 1 : 0;
    }
    c.count = kept;
}

// Keeps the smallest set of largest candidates whose measure reaches the target; weight(value, id) is one's
// share of it.
template <class Measure, class Weight>
void keep_largest(Candidates& c, Measure measure, Weight weight, float lowest, float highest, double target,
                  Scratch& scratch) {
    const Bracket bracket = narrow(measure, lowest, highest, target);
    if (bracket.at_low.mass < target) return;
    const Candidates boundary = boundary_of(c, bracket, scratch);
    double reached = bracket.at_high.mass;
    int64_t last = 0;
    for (; last < boundary.count - 1; ++last) {
        reached += weight(boundary.values[last], boundary.ids[last]);
        if (reached >= target) break;
    }
    const float last_value = boundary.values[last];
    const bool has_equals_after = last + 1 < boundary.count && boundary.values[last + 1] == last_value;
    keep_through(c, last_value, boundary.ids[last], has_equals_after);
}

Tally count_tally(const float* values, int64_t n, float threshold) {
    const int64_t count = row_kernels().count_at_least(values, n, threshold);
    return {static_cast<double>(count), count};
}

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

// The block in which the running sum exceeds the target, which is reduced to what remains of it there. If
// rounding leaves none, the last block with any weight, and an infinite rest.
int64_t find_block(const float* sums, int64_t blocks, double& target) {
    int64_t last = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        if (target < static_cast<double>(sums[b])) return b;
        target -= static_cast<double>(sums[b]);
        if (sums[b] > 0) last = b;
    }
    target = static_cast<double>(kInfinity);
    return last;
}

int64_t find_in_block(const float* weights, int64_t n, double target) {
    int64_t last = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (target < static_cast<double>(weights[i])) return i;
        target -= static_cast<double>(weights[i]);
        if (weights[i] > 0) last = i;
    }
    return last;
}

}  // namespace

float next_above(float value) {
    return std::fabs(value) < FLT_MIN ? FLT_MIN : std::nextafter(value, kInfinity);
}

void Scratch::fit(int64_t vocab) {
    const auto size = static_cast<size_t>(vocab + kSlack);
    if (values.size() >= size) return;
    for (auto* buffer : {&values, &boundary_values, &keys, &logits}) buffer->resize(size);
    for (auto* buffer : {&ids, &boundary_ids}) buffer->resize(size);
    blocks.resize(static_cast<size_t>(blocks_of(vocab)));
    marks.resize(size);  // zero, and left so by whoever uses it
}

Scratch& scratch_for(int64_t vocab) {
    static thread_local Scratch scratch;
    scratch.fit(vocab);
    return scratch;
}

float top_k_bound(const float* block_max, int64_t blocks, float row_max, int64_t k) {
    const auto measure = [&](float t) { return count_tally(block_max, blocks, t); };
    const Bracket bracket = narrow(measure, -FLT_MAX, row_max, static_cast<double>(k));
    return bracket.at_low.count < k ? -FLT_MAX : bracket.low;
}

void keep_top_k(Candidates& c, int64_t k, float lowest, float highest, Scratch& scratch) {
    if (c.count <= k) return;
    keep_largest(
        c, [&](float t) { return count_tally(c.values, c.count, t); }, [](float, int32_t) { return 1.0; },
        lowest, highest, static_cast<double>(k), scratch);
}

void keep_nucleus(Candidates& c, double top_p, double total, Scratch& scratch) {
    // All weights below (1 - top_p) * total / count together lack the mass to be needed; 0.99 is room for
    // rounding.
    const double lowest = 0.99 * (1 - top_p) * total / static_cast<double>(c.count);
    keep_largest(
        c, [&](float t) { return row_kernels().mass_at_least(c.values, c.values, c.count, t); },
        [](float weight, int32_t) { return static_cast<double>(weight); }, static_cast<float>(lowest), 1.0f,
        top_p * total, scratch);
}

void keep_typical(Candidates& c, double typical_p, const float* logits, float max, float scale,
                  Scratch& scratch) {
    // With l the logarithm of a weight, a token's surprise is log(total) - l and the entropy is the mean of
    // the surprises: they are as far apart as l and its mean.
    const auto log_weight = [&](int32_t id) {
        return static_cast<double>(std::max((logits[id] - max) * scale, kLeastLogWeight));
    };
    double total = 0, mean = 0;
    for (int64_t i = 0; i < c.count; ++i) {
        total += static_cast<double>(c.values[i]);
        mean += static_cast<double>(c.values[i]) * log_weight(c.ids[i]);
    }
    mean /= total;
    Candidates by_key = {scratch.keys.data(), c.ids, c.count};
    float lowest = 0;
    for (int64_t i = 0; i < c.count; ++i) {
        by_key.values[i] = -static_cast<float>(std::fabs(log_weight(c.ids[i]) - mean));
        lowest = std::min(lowest, by_key.values[i]);
    }
    const auto weight = [&](float, int32_t id) {
        return static_cast<double>(c.values[std::lower_bound(c.ids, c.ids + c.count, id) - c.ids]);
    };
    keep_largest(
        by_key, [&](float t) { return row_kernels().mass_at_least(by_key.values, c.values, c.count, t); },
        weight, lowest, 0.0f, typical_p * total, scratch);
    c.count = by_key.count;
    for (int64_t i = 0; i < c.count; ++i) c.values[i] = logits[c.ids[i]];
    exponentiate(c, max, scale);
}

void sort_descending(Candidates& c) {
    if (c.count > 4 * kFew) return sort_many(c);
    for (int64_t i = 1; i < c.count; ++i) {
        const float value = c.values[i];
        const int32_t id = c.ids[i];
        int64_t j = i;
        for (; j > 0 && c.values[j - 1] < value; --j) {
            c.values[j] = c.values[j - 1];
            c.ids[j] = c.ids[j - 1];
        }
        c.values[j] = value;
        c.ids[j] = id;
    }
}

void exponentiate(Candidates& c, float max, float scale) {
    row_kernels().exp_scaled(c.values, c.count, max, scale, c.values);
}

int32_t draw(const Candidates& c, double u, Scratch& scratch) {
    float* sums = scratch.blocks.data();
    double target = u * row_kernels().sum_blocks(c.values, c.count, sums);
    const int64_t begin = find_block(sums, blocks_of(c.count), target) * kBlock;
    return c.ids[begin + find_in_block(c.values + begin, std::min(kBlock, c.count - begin), target)];
}

int32_t draw_from_row(const float* row, int64_t vocab, float max, float scale, double u, Scratch& scratch) {
    float* sums = scratch.blocks.data();
    double target = u * row_kernels().exp_sum_blocks(row, vocab, max, scale, sums);
    const int64_t begin = find_block(sums, blocks_of(vocab), target) * kBlock;
    const int64_t size = std::min(kBlock, vocab - begin);
    row_kernels().exp_scaled(row + begin, size, max, scale, scratch.values.data());
    return static_cast<int32_t>(begin + find_in_block(scratch.values.data(), size, target));
}

}  // namespace tandem
