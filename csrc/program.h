// A model's step as a list of operations over rows of activations, run by one team from the first to the
// last.
//
// An architecture is data here too: Python puts the list together from the model's config and weights, and
// nothing in it knows of models. There is one row a token; what an operation writes the next one reads.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cached_attention.h"
#include "linear.h"
#include "packed_weight.h"

namespace tandem {

// Sequences' keys in the cache.
struct SequenceTable {
    const int32_t* lengths;  // (sequences,) keys, those of this step's tokens included
    const int32_t* blocks;   // (sequences, stride)
    int64_t stride;
};

// What a step is about, all of it checked by the caller.
struct Step {
    int64_t tokens, sequences;
    const int64_t *token_ids, *positions, *slots;  // (tokens,)
    const int32_t* cu_seqlens;                     // (sequences + 1,)
    int32_t longest;                               // most tokens of a sequence
    SequenceTable own, source;                     // self-attention's keys, and cross-attention's
    std::byte* cache;                              // the first block
    const int64_t* selected;                       // rows whose outputs are wanted
    int64_t num_selected;
    float* out;  // (num_selected, out_stride)
    int64_t out_stride;
};

// Memory for the rows of a step. Its sizes are fixed when the program is put together, but for the number of
// rows.
class Activations {
  public:
    int add_floats(int64_t width);
    int add_bytes(int64_t stride, int64_t groups);

    // Makes room; what was there is lost where there was not enough.
    void reserve(int64_t rows);
    int64_t nbytes() const;

    // A matrix of rows, `stride` numbers apart.
    float* floats(int id) const {
        return reinterpret_cast<float*>(floats_[static_cast<size_t>(id)].memory->data());
    }
    int64_t stride(int id) const { return floats_[static_cast<size_t>(id)].stride; }
    int64_t width(int id) const { return floats_[static_cast<size_t>(id)].width; }
    ByteRows bytes(int id) const;
    int64_t num_floats() const { return static_cast<int64_t>(floats_.size()); }
    int64_t num_bytes() const { return static_cast<int64_t>(bytes_.size()); }

    std::vector<float> rotary_cos, rotary_sin;  // (rows, rotated / 2) of this step
    AttentionScratch attention;

  private:
    struct Floats {
        int64_t width, stride;
        std::unique_ptr<AlignedBytes> memory;
    };
    struct Bytes {
        int64_t stride, groups;
        std::unique_ptr<AlignedBytes> memory;
        std::vector<float> scales;
        std::vector<int32_t> sums;
        std::vector<Outlier> outliers;
    };
    int64_t rows_ = 0;
    std::vector<Floats> floats_;
    std::vector<Bytes> bytes_;
};

enum class OpKind { linear, attention, other };

class Op {
  public:
    virtual ~Op() = default;
    // Called by every member of the team; what it writes is there for all of them when it returns.
    virtual void run(const Step& step, Activations& activations, Team& team) const = 0;
    virtual OpKind kind() const { return OpKind::other; }
};

class Program {
  public:
    Activations activations;
    void add(std::unique_ptr<const Op> op) { ops_.push_back(std::move(op)); }
    // Calls from several threads take turns: the rows are the program's own.
    void run(const Step& step, int num_threads);

    // Seconds spent in each kind of operation since the last call.
    std::array<double, 3> take_seconds();

  private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<const Op>> ops_;
    std::array<double, 3> seconds_{};
};

}  // namespace tandem
