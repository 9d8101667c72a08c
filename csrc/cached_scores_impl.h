// What becomes of a row's scores between the two products: shaped, masked, and made weights. Compiled once a
// CPU path.
#pragma once

#include "attention_scores_impl.h"
#include "cached_products_impl.h"

namespace tandem {
namespace {

// 0, 1, 2, ...
inline Vec lane_numbers() {
    Vec lanes;
    for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<float>(i);
    return lanes;
}

// Biases of the distances from `first` on, one a lane.
inline Vec biases_from(const float* row, int64_t reach, int64_t first) {
    const int64_t last = first + kWidth - 1;
    if (first >= -reach && last <= reach) return load(row + reach + first);
    if (last <= -reach) return splat(row[0]);
    if (first >= reach) return splat(row[2 * reach]);
    Vec biases;
    for (int i = 0; i < kWidth; ++i) biases[i] = row[place_of(first + i, reach)];
    return biases;
}

// The scores of one row with the pages of a segment. Lanes of keys outside `seen` may hold anything.
template <class T>
class RowScores {
  public:
    RowScores(const CachedHead& head, int64_t row, KeyRange seen, const Pages& pages, float* scores)
        : head_(head),
          pages_(pages),
          scores_(scores),
          seen_(seen),
          position_(row / head.groups + head.diagonal) {
        const int64_t query_head = row % head.groups;
        if (head.bias.rows != nullptr) biases_ = head.bias.rows + query_head * (2 * head.bias.reach + 1);
        if (head.bias.slopes != nullptr) slope_ = head.bias.slopes[query_head];
    }

    // Shapes the scores; those of keys that are not seen become -inf. Returns the largest, -inf for no key.
    float finish_scores() {
        Lanes top = splat_lanes(-kInfinity);
        for_each_page([&](int64_t page, float* scores) {
            for (int p = 0; p < kParts; ++p) {
                const int64_t key = (pages_.first + page) * kPage + p * kWidth;
                Vec score = load(scores + p * kWidth);
                if constexpr (kScaled) score *= load(scales(pages_.keys[page]) + p * kWidth);
                score = mask(shape(score, key - position_), key);
                store(scores + p * kWidth, score);
                top.part[p] = larger(top.part[p], score);
            }
        });
        return max_of(top);
    }

    // Scores to exp(score - max), and their sum. For int8 the weights that are stored take the values' scale.
    float to_weights(float max) {
        // A row that sees no key has no maximum to subtract.
        const Vec base = splat(max >= -kLargest ? max : 0.0f);
        Lanes sum = splat_lanes(0.0f);
        for_each_page([&](int64_t page, float* scores) {
            for (int p = 0; p < kParts; ++p) {
                Vec weight = exp_or_nan(load(scores + p * kWidth) - base);
                sum.part[p] += weight;
                if constexpr (kScaled) weight *= load(scales(pages_.values(page)) + p * kWidth);
                store(scores + p * kWidth, weight);
            }
        });
        return sum_of(sum);
    }

  private:
    static constexpr bool kScaled = sizeof(T) == 1;

    // Calls body(page, its scores) for the pages that hold keys that are seen.
    template <class Body>
    void for_each_page(Body body) const {
        if (seen_.end <= seen_.begin) return;
        const int64_t end = (seen_.end + kPage - 1) / kPage - pages_.first;
        for (int64_t page = seen_.begin / kPage - pages_.first; page < end; ++page)
            body(page, scores_ + page * kPage);
    }

    const float* scales(const std::byte* part) const {
        return reinterpret_cast<const float*>(part + element_bytes(CacheType::int8, head_.cache.head_dim));
    }

    Vec shape(Vec score, int64_t distance) const {
        if (head_.softcap > 0) score = tanh_of(score * (1.0f / head_.softcap)) * head_.softcap;
        if (biases_ == nullptr && head_.bias.slopes == nullptr) return score;
        Vec bias = splat(0.0f);
        if (biases_ != nullptr) bias = biases_from(biases_, head_.bias.reach, distance);
        if (head_.bias.slopes != nullptr) {
            const Vec from_query = lane_numbers() + static_cast<float>(distance);
            bias = bias - slope_ * larger(from_query, -from_query);
        }
        return score + bias;
    }

    Vec mask(Vec score, int64_t key) const {
        if (key >= seen_.begin && key + kWidth <= seen_.end) return score;
        const Vec begin = splat(static_cast<float>(seen_.begin - key));
        const Vec last = splat(static_cast<float>(seen_.end - 1 - key));
        const Mask inside = both(at_least(lane_numbers(), begin), at_least(last, lane_numbers()));
        return select(inside, score, splat(-kInfinity));
    }

    const CachedHead& head_;
    const Pages& pages_;
    float* scores_;
    KeyRange seen_;
    int64_t position_;
    const float* biases_ = nullptr;
    float slope_ = 0;
};

}  // namespace
}  // namespace tandem
