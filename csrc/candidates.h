// The tokens still in the running, and the filters that keep some of them.
#pragma once

#include <cstdint>
#include <vector>

namespace tandem {

// The next normal float: subnormals are stepped over, for a thread that flushes them would take them for 0.
float next_above(float value);

// Grow-only buffers of one thread, so that a call allocates nothing once it has seen a vocabulary.
struct Scratch {
    std::vector<float> values, boundary_values, keys, blocks, logits;
    std::vector<int32_t> ids, boundary_ids;
    std::vector<uint32_t> marks;

    void fit(int64_t vocab);
};

// The calling thread's, large enough for rows of so many tokens.
Scratch& scratch_for(int64_t vocab);

// Values with their token ids, in ascending order of id: logits at first, then weights (probabilities up to a
// factor).
struct Candidates {
    float* values;
    int32_t* ids;
    int64_t count;
};

// A lower bound on the k-th largest element of a row, from the maxima of its blocks: k blocks reach it, so k
// elements do. -FLT_MAX if there are fewer than k blocks.
float top_k_bound(const float* block_max, int64_t blocks, float row_max, int64_t k);

// Keeps the k largest, lower ids first among equals. Every value is in [lowest, highest].
void keep_top_k(Candidates& candidates, int64_t k, float lowest, float highest, Scratch& scratch);

// Keeps the smallest set of largest weights whose sum is at least top_p * total. The largest weight is 1.
void keep_nucleus(Candidates& candidates, double top_p, double total, Scratch& scratch);

// Keeps the smallest set of weights exp((logits[id] - max) * scale) whose surprise lies closest to the
// entropy of all of them, lower ids first among equals, and whose sum is at least typical_p of theirs.
void keep_typical(Candidates& candidates, double typical_p, const float* logits, float max, float scale,
                  Scratch& scratch);

// Largest first, lower ids first among equals.
void sort_descending(Candidates& candidates);

// Weights in place of logits: exp((value - max) * scale).
void exponentiate(Candidates& candidates, float max, float scale);

// The first candidate at which the running sum of the weights, in order of id, exceeds u * their sum.
int32_t draw(const Candidates& candidates, double u, Scratch& scratch);

// The same for a whole row and the weights exp((row[i] - max) * scale), none of which are stored.
int32_t draw_from_row(const float* row, int64_t vocab, float max, float scale, double u, Scratch& scratch);

}  // namespace tandem
