// The loops over a whole vocabulary that every stage of sampling is made of, one implementation a CPU path.
//
// A row is cut into blocks of kBlock elements, the last one short. Every path adds a block up in the same
// order (16 lanes, then a fixed tree) and never fuses a product with a sum, so all paths return the same
// bits.
#pragma once

#include <cstdint>

namespace tandem {

constexpr int64_t kBlock = 128;
constexpr int64_t kLanes = 16;

// Buffers filled by `collect` need this much room behind the last element: whole vectors are stored.
constexpr int64_t kSlack = kLanes;

struct RowMax {
    float max;
    bool has_nan;
};

struct Tally {
    double mass;
    int64_t count;
};

struct RowKernels {
    // Largest element of the row and of each block (block_max: one float a block), and whether a NaN was met.
    // Reads each element once; bound by memory.
    RowMax (*scan)(const float* row, int64_t n, float* block_max);

    // How many elements are >= threshold.
    int64_t (*count_at_least)(const float* values, int64_t n, float threshold);

    // How many keys are >= threshold, and the sum of their weights. Both may be the same array.
    Tally (*mass_at_least)(const float* keys, const float* weights, int64_t n, float threshold);

    // Copies the elements in [low, high), and their ids, in order; returns how many. ids may be null: 0, 1,
    // 2, ...; block_max may be null, otherwise blocks that hold nothing are skipped. In place is allowed.
    int64_t (*collect)(const float* values, const int32_t* ids, int64_t n, const float* block_max, float low,
                       float high, float* out_values, int32_t* out_ids);

    // out[i] = exp((values[i] - max) * scale), 0 below exp(-87). In place is allowed.
    void (*exp_scaled)(const float* values, int64_t n, float max, float scale, float* out);

    // Sum of each block, and of all in double.
    double (*sum_blocks)(const float* values, int64_t n, float* block_sums);

    // As exp_scaled then sum_blocks, without storing the exponentials.
    double (*exp_sum_blocks)(const float* values, int64_t n, float max, float scale, float* block_sums);

    // row[i] = -inf where bit i % 32 of words[i / 32] is 0. Bits behind the last element count for nothing.
    void (*keep_allowed)(float* row, int64_t n, const int32_t* words);
};

extern const RowKernels kGenericRowKernels;
#if defined(__x86_64__)
extern const RowKernels kAvx2RowKernels;
extern const RowKernels kAvx512RowKernels;
#endif

// The kernels of cpu_path().
const RowKernels& row_kernels();

}  // namespace tandem
