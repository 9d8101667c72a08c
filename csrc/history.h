// The tokens that rows hold already, as places in a buffer of the caller's: a history that grows in its place
// from step to step takes no copy, only a new length.
#pragma once

#include <cstdint>

namespace tandem {

// One row's: a prompt's ids, then the output's.
struct History {
    const int32_t* ids;
    int64_t length;
    int64_t prompt_length;

    bool within(int64_t vocab) const;
};

// Row r's is ids[starts[r]] and the lengths[r] - 1 ids behind it, the first prompt_lengths[r] of them its
// prompt.
struct Histories {
    const int32_t* ids;
    int64_t size;  // of ids
    const int64_t* starts;
    const int32_t* lengths;
    const int32_t* prompt_lengths;  // null: nothing is prompt

    // The caller's arrays may have changed since they were checked, so nothing outside ids is ever in it.
    History of(int64_t row) const;

    // Throws what column_check.h says; `names` as there.
    void check(int64_t rows, const int64_t* names = nullptr) const;
};

}  // namespace tandem
