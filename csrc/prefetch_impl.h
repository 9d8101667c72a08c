// Fetching what will be read next while something else is computed. Included only by the bodies of kernels.
#pragma once

#include "linear_kernels.h"

namespace tandem {
namespace {

// The share of some upcoming memory that one tile of several fetches in each of its steps. Left to the
// hardware, memory would stand still whenever a tile works on what the cache holds already.
class Prefetcher {
  public:
    Prefetcher(Upcoming upcoming, int64_t tile, int64_t tiles, int64_t steps) {
        if (upcoming.data == nullptr) return;
        const int64_t lines = (upcoming.size + kLine - 1) / kLine, share = (lines + tiles - 1) / tiles;
        const int64_t end = (tile + 1) * share < lines ? (tile + 1) * share : lines;
        next_ = upcoming.data + tile * share * kLine;
        end_ = upcoming.data + end * kLine;
        per_step_ = ((share + steps - 1) / steps) * kLine;
    }

    void step() {
        const uint8_t* stop = next_ + per_step_ < end_ ? next_ + per_step_ : end_;
        for (; next_ < stop; next_ += kLine) __builtin_prefetch(next_, 0, 2);
    }

  private:
    static constexpr int64_t kLine = 64;
    const uint8_t *next_ = nullptr, *end_ = nullptr;
    int64_t per_step_ = 0;
};

}  // namespace
}  // namespace tandem
