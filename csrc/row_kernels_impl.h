// The body of row_kernels.h, compiled once a CPU path with that path's compiler flags.
#pragma once

#include "row_kernels.h"
#include "simd.h"

namespace tandem {
namespace {

constexpr float kLowest = -__builtin_inff();

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The last, short block of a row, filled up with -inf or 0 so that it is treated like all others.
struct PaddedBlock {
    float values[kBlock];

    PaddedBlock(const float* rest, int64_t n, float filler) {
        for (int64_t i = 0; i < kBlock; ++i) values[i] = i < n ? rest[i] : filler;
    }
};

// Calls body(block index, pointer to kBlock floats) for each block of the row.
template <class Body>
inline void for_each_block(const float* values, int64_t n, float filler, Body body) {
    const int64_t whole = n / kBlock;
    for (int64_t b = 0; b < whole; ++b) body(b, values + b * kBlock);
    if (whole * kBlock == n) return;
    const PaddedBlock last(values + whole * kBlock, n - whole * kBlock, filler);
    body(whole, last.values);
}

RowMax scan(const float* row, int64_t n, float* block_max) {
    Mask nan{};
    float row_max = kLowest;
    for_each_block(row, n, kLowest, [&](int64_t b, const float* x) {
        Lanes lanes = splat_lanes(kLowest);
        for (int64_t i = 0; i < kBlock; i += 2 * kLanes)
            for (int p = 0; p < kParts; ++p) {
                const Vec first = load(x + i + p * kWidth);
                const Vec second = load(x + i + kLanes + p * kWidth);
                nan = either(nan, either_nan(first, second));
                lanes.part[p] = larger(lanes.part[p], larger(first, second));
            }
        block_max[b] = max_of(lanes);
        row_max = row_max < block_max[b] ? block_max[b] : row_max;
    });
    return {row_max, any(nan)};
}

int64_t count_at_least(const float* values, int64_t n, float threshold) {
    const Vec limit = splat(threshold);
    const int64_t whole = n - n % kWidth;
    int64_t total = 0;
#if defined(__AVX512F__)
    for (int64_t i = 0; i < whole; i += kWidth) total += count(at_least(load(values + i), limit));
#else
    Ints counts{};  // a matching lane is -1; no row has 2^31 elements
    for (int64_t i = 0; i < whole; i += kWidth) counts -= at_least(load(values + i), limit);
    for (int i = 0; i < kWidth; ++i) total += counts[i];
#endif
    for (int64_t i = whole; i < n; ++i) total += values[i] >= threshold ? 1 : 0;
    return total;
}

float block_mass_at_least(const float* keys, const float* weights, Vec limit) {
    Lanes lanes = splat_lanes(0.0f);
    for (int64_t i = 0; i < kBlock; i += kLanes)
        for (int p = 0; p < kParts; ++p) {
            const int64_t at = i + p * kWidth;
            lanes.part[p] += keep_where(at_least(load(keys + at), limit), load(weights + at));
        }
    return sum_of(lanes);
}

Tally mass_at_least(const float* keys, const float* weights, int64_t n, float threshold) {
    const Vec limit = splat(threshold);
    const int64_t whole = n - n % kBlock;
    double mass = 0;
    for (int64_t i = 0; i < whole; i += kBlock)
        mass += static_cast<double>(block_mass_at_least(keys + i, weights + i, limit));
    if (whole < n) {
        const PaddedBlock last_keys(keys + whole, n - whole, kLowest);
        const PaddedBlock last_weights(weights + whole, n - whole, 0.0f);
        mass += static_cast<double>(block_mass_at_least(last_keys.values, last_weights.values, limit));
    }
    return {mass, count_at_least(keys, n, threshold)};
}

// `collect` for elements begin to end - 1, written from place `kept` on; returns the place after the last.
int64_t collect_range(const float* values, const int32_t* ids, int64_t begin, int64_t end, float low,
                      float high, float* out_values, int32_t* out_ids, int64_t kept) {
    const auto keep_one = [&](int64_t i) {
        const float value = values[i];
        const int32_t id = ids == nullptr ? static_cast<int32_t>(i) : ids[i];
        out_values[kept] = value;
        out_ids[kept] = id;
        kept += value >= low && value < high ? 1 : 0;
    };
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) {
        const Vec v = load(values + i);
        const Mask reaches = at_least(v, splat(low));
        if (!any(reaches)) continue;
#if defined(__AVX512F__)
        // Compressed in a register and then stored whole: compressing straight to memory is slow on Zen 4.
        const Mask mask = reaches & below(v, splat(high));
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i id = ids == nullptr
                               ? _mm512_add_epi32(first, _mm512_set1_epi32(static_cast<int32_t>(i)))
                               : _mm512_loadu_si512(ids + i);
        _mm512_storeu_ps(out_values + kept, _mm512_maskz_compress_ps(mask, v));
        _mm512_storeu_si512(out_ids + kept, _mm512_maskz_compress_epi32(mask, id));
        kept += count(mask);
#else
        for (int lane = 0; lane < kWidth; ++lane) keep_one(i + lane);
#endif
    }
    for (; i < end; ++i) keep_one(i);
    return kept;
}

int64_t collect(const float* values, const int32_t* ids, int64_t n, const float* block_max, float low,
                float high, float* out_values, int32_t* out_ids) {
    int64_t kept = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        if (block_max != nullptr && block_max[begin / kBlock] < low) continue;
        const int64_t end = smaller(begin + kBlock, n);
        kept = collect_range(values, ids, begin, end, low, high, out_values, out_ids, kept);
    }
    return kept;
}

void exp_scaled(const float* values, int64_t n, float max, float scale, float* out) {
    const int64_t whole = n - n % kWidth;
    for (int64_t i = 0; i < whole; i += kWidth)
        store(out + i, exp_nonpositive((load(values + i) - max) * scale));
    if (whole == n) return;
    float rest[kWidth] = {};
    for (int64_t i = whole; i < n; ++i) rest[i - whole] = values[i];
    store(rest, exp_nonpositive((load(rest) - max) * scale));
    for (int64_t i = whole; i < n; ++i) out[i] = rest[i - whole];
}

double sum_blocks(const float* values, int64_t n, float* block_sums) {
    double total = 0;
    for_each_block(values, n, 0.0f, [&](int64_t b, const float* x) {
        Lanes lanes = splat_lanes(0.0f);
        for (int64_t i = 0; i < kBlock; i += kLanes)
            for (int p = 0; p < kParts; ++p) lanes.part[p] += load(x + i + p * kWidth);
        block_sums[b] = sum_of(lanes);
        total += static_cast<double>(block_sums[b]);
    });
    return total;
}

double exp_sum_blocks(const float* values, int64_t n, float max, float scale, float* block_sums) {
    double total = 0;
    for_each_block(values, n, kLowest, [&](int64_t b, const float* x) {
        Lanes lanes = splat_lanes(0.0f);
        for (int64_t i = 0; i < kBlock; i += kLanes)
            for (int p = 0; p < kParts; ++p)
                lanes.part[p] += exp_nonpositive((load(x + i + p * kWidth) - max) * scale);
        block_sums[b] = sum_of(lanes);
        total += static_cast<double>(block_sums[b]);
    });
    return total;
}

void keep_allowed(float* row, int64_t n, const int32_t* words) {
    constexpr int64_t kWord = 32;
    const Ints banned = reinterpret_cast<Ints>(splat(kLowest));
    Bits lane_bit{};
    for (int i = 0; i < kWidth; ++i) lane_bit[i] = uint32_t{1} << i;
    int64_t i = 0;
    for (; i + kWord <= n; i += kWord) {
        const auto word = static_cast<uint32_t>(words[i / kWord]);
        if (word == ~uint32_t{0}) continue;
        for (int p = 0; p < kWord / kWidth; ++p) {
            float* scores = row + i + p * kWidth;
            const Ints allowed = ((word >> (p * kWidth)) & lane_bit) != 0;
            const Ints kept = reinterpret_cast<Ints>(load(scores));
            store(scores, reinterpret_cast<Vec>((kept & allowed) | (banned & ~allowed)));
        }
    }
    for (; i < n; ++i)
        if ((static_cast<uint32_t>(words[i / kWord]) >> (i % kWord) & 1) == 0) row[i] = kLowest;
}

constexpr RowKernels kRowKernels = {scan,       count_at_least, mass_at_least,  collect,
                                    exp_scaled, sum_blocks,     exp_sum_blocks, keep_allowed};

}  // namespace
}  // namespace tandem
