// What becomes of a block of scores between the product and the softmax: capped, biased, masked; and the way
// back. Compiled once a CPU path.
#pragma once

#include "attention_rows_impl.h"

namespace tandem {
namespace {

// Relative error about 3e-7. Near 0 an odd polynomial (Cephes' tanhf), further out (1 - e) / (1 + e) with e =
// e^-2|x|.
inline Vec tanh_of(Vec x) {
    const Vec square = x * x;
    Vec p = multiply_add(square, splat(-5.70498872745e-3f), splat(2.06390887954e-2f));
    p = multiply_add(p, square, splat(-5.37397155531e-2f));
    p = multiply_add(p, square, splat(1.33314422036e-1f));
    p = multiply_add(p, square, splat(-3.33332819422e-1f));
    const Vec near = multiply_add(p * square, x, x);
    const Bits sign = reinterpret_cast<Bits>(x) & 0x80000000u;
    const Vec size = reinterpret_cast<Vec>(reinterpret_cast<Bits>(x) ^ sign);
    const Vec power = exp_or_nan(size * -2.0f);
    const Vec far = (1.0f - power) / (1.0f + power);
    const Vec signed_far = reinterpret_cast<Vec>(reinterpret_cast<Bits>(far) | sign);
    return select(at_least(size, splat(0.625f)), signed_far, near);
}

// Scores to softcap * tanh(score / softcap), and, where wanted, the slope of that.
inline void cap_scores(float softcap, int64_t keys, int64_t lanes, float* scores, float* slopes = nullptr) {
    const float inverse = 1.0f / softcap;
    for (int64_t j = 0; j < keys * kRowBlock; j += kRowBlock)
        for (int64_t i = j; i < j + lanes; i += kWidth) {
            const Vec t = tanh_of(load(scores + i) * inverse);
            store(scores + i, t * softcap);
            if (slopes != nullptr) store(slopes + i, 1.0f - t * t);
        }
}

// Gradients of shaped scores to those of the products of keys and unscaled queries.
inline void chain_block(const AttentionHead& head, const float* slopes, int64_t keys, int64_t lanes,
                        float* gradients) {
    for (int64_t j = 0; j < keys * kRowBlock; j += kRowBlock)
        for (int64_t i = j; i < j + lanes; i += kWidth) {
            const Vec slope = head.softcap > 0 ? load(slopes + i) : splat(1.0f);
            store(gradients + i, load(gradients + i) * slope * head.softmax_scale);
        }
}

// Scores of keys that a row does not see become -inf.
inline void mask_block(const RowBlock& rows, int64_t begin, int64_t end, float* scores) {
    for (int64_t j = begin; j < end; ++j, scores += kRowBlock) {
        const Vec key = splat(static_cast<float>(j));
        for (int64_t i = 0; i < rows.lanes; i += kWidth) {
            const Mask seen =
                both(at_least(load(rows.last_key + i), key), at_least(key, load(rows.first_key + i)));
            store(scores + i, select(seen, load(scores + i), splat(-kInfinity)));
        }
    }
}

inline bool has_bias(const AttentionHead& head) {
    return head.bias.rows != nullptr || head.bias.slopes != nullptr;
}

// Where a distance stands in a head's row of biases.
inline int64_t place_of(int64_t distance, int64_t reach) {
    return larger(-reach, at_most(distance, reach)) + reach;
}

inline float bias_of(const DistanceBias& bias, int64_t head, int64_t distance) {
    float sum = 0;
    if (bias.rows != nullptr) sum = bias.rows[head * (2 * bias.reach + 1) + place_of(distance, bias.reach)];
    if (bias.slopes == nullptr) return sum;
    return sum - bias.slopes[head] * static_cast<float>(distance < 0 ? -distance : distance);
}

// The biases of a block of scores have one number a head and distance, far fewer than scores. Laid out from
// the largest distance down, the heads of a group side by side, they are in the order of the rows: those of a
// key stand in one run, the next key's `groups` places before it.
struct BiasStrip {
    const AttentionHead& head;
    int64_t lanes, keys;
    int64_t top;        // the largest distance, from the first row to the last key
    int64_t distances;  // from top down
    float* memory;
    float* last;  // the run of the last key

    BiasStrip(const RowBlock& rows, int64_t begin, int64_t end, float* strip)
        : head(rows.head),
          lanes(rows.lanes),
          keys(end - begin),
          top(end - 1 - rows.low()),
          distances((rows.first % head.groups + lanes - 1) / head.groups + keys),
          memory(strip),
          last(strip + rows.first % head.groups) {}

    float* run(int64_t key) const { return last + (keys - 1 - key) * head.groups; }

    void add_to(float* scores) const {
        float* place = memory;
        for (int64_t t = 0; t < distances; ++t)
            for (int64_t g = 0; g < head.groups; ++g) *place++ = bias_of(head.bias, g, top - t);
        for (int64_t j = 0; j < keys; ++j, scores += kRowBlock) {
            const float* biases = run(j);
            for (int64_t i = 0; i < lanes; i += kWidth)
                store(scores + i, load(scores + i) + load(biases + i));
        }
    }

    // The gradients of the scores, summed by distance and added to those of the heads' rows of biases. Strips
    // are short, so float is enough for them; a row gathers many.
    void add_gradient(const float* gradients, double* sums) const {
        for (int64_t i = 0; i < distances * head.groups; ++i) memory[i] = 0;
        for (int64_t j = 0; j < keys; ++j, gradients += kRowBlock) {
            float* biases = run(j);
            for (int64_t i = 0; i < lanes; i += kWidth)
                store(biases + i, load(biases + i) + load(gradients + i));
        }
        const int64_t width = 2 * head.bias.reach + 1;
        const float* place = memory;
        for (int64_t t = 0; t < distances; ++t)
            for (int64_t g = 0; g < head.groups; ++g)
                sums[g * width + place_of(top - t, head.bias.reach)] += static_cast<double>(*place++);
    }
};

// The biases of one row whose scores lie side by side, from key `begin` on.
inline void add_bias_to_single(const RowBlock& rows, int64_t begin, int64_t lanes, float* strip,
                               float* scores) {
    const int64_t head = rows.first % rows.head.groups, nearest = begin - rows.low();
    for (int64_t j = 0; j < lanes; ++j) strip[j] = bias_of(rows.head.bias, head, nearest + j);
    for (int64_t j = 0; j < lanes; j += kWidth) store(scores + j, load(scores + j) + load(strip + j));
}

}  // namespace
}  // namespace tandem
