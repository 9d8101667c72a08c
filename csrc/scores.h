// Rows of floats, a score a token of the vocabulary: what choices are made from.
#pragma once

#include <cstdint>

namespace tandem {

// Rows of contiguous floats, `stride` floats apart. Never written.
struct Logits {
    const float* data;
    int64_t rows, vocab, stride;
};

// The same, to be changed in place; no two rows overlap.
struct Scores {
    float* data;
    int64_t rows, vocab, stride;

    float* row(int64_t index) const { return data + index * stride; }
};

}  // namespace tandem
