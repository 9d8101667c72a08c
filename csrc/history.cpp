#include "history.h"

#include <algorithm>

#include "column_check.h"

namespace tandem {

bool History::within(int64_t vocab) const {
    return std::all_of(ids, ids + length, [vocab](int32_t id) { return 0 <= id && id < vocab; });
}

History Histories::of(int64_t row) const {
    const int64_t start = std::clamp<int64_t>(starts[row], 0, size);
    const int64_t length = std::clamp<int64_t>(lengths[row], 0, size - start);
    return {ids + start, length, prompt_lengths == nullptr ? 0 : prompt_lengths[row]};
}

void Histories::check(int64_t rows, const int64_t* names) const {
    check_column("history_lengths", lengths, rows, "at least 0", [](int32_t x) { return x >= 0; }, names);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t name = names == nullptr ? row : names[row];
        if (starts[row] < 0 || starts[row] > size - lengths[row])
            refuse("history_starts", "a place from which the row's history lies in history_ids",
                   static_cast<double>(starts[row]), name);
        if (prompt_lengths != nullptr && (prompt_lengths[row] < 0 || prompt_lengths[row] > lengths[row]))
            refuse("prompt_lengths", "from 0 to the length of the row's history", prompt_lengths[row], name);
    }
}

}  // namespace tandem
