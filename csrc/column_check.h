// Refusals of values in columns of numbers, one entry a row: std::invalid_argument with one sentence that
// names the field, what is allowed, the value and the row.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tandem {

[[noreturn]] inline void refuse(const char* field, const char* allowed, double value, int64_t row) {
    std::string shown = std::to_string(value);
    if (shown.find('.') != std::string::npos) shown.erase(shown.find_last_not_of('0') + 1);
    if (shown.back() == '.') shown.pop_back();
    throw std::invalid_argument(std::string(field) + " must be " + allowed + ", got " + shown + " in row " +
                                std::to_string(row));
}

// rows: the names of the entries' rows; null where entry i is of row i.
template <class T, class Allowed>
void check_column(const char* field, const T* values, int64_t count, const char* allowed, Allowed is_allowed,
                  const int64_t* rows = nullptr) {
    for (int64_t i = 0; i < count; ++i)
        if (!is_allowed(values[i]))
            refuse(field, allowed, static_cast<double>(values[i]), rows == nullptr ? i : rows[i]);
}

}  // namespace tandem
