// Weights of a linear layer in the order in which its kernels read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace tandem {

// Outputs that lie together: four vectors of AVX-512, and one run of memory for a thread to read.
constexpr int64_t kChunk = 64;
// Inputs of a quantised row are filled up to whole tiles of AMX.
constexpr int64_t kDepthUnit = 64;
// A byte of an 8-bit weight is the weight plus this: the instructions multiply unsigned bytes by signed ones,
// and activations are the signed ones, because they have the same sums whatever the weights.
constexpr int32_t kByteOffset = 128;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// How a weight is stored. Float kinds are multiplied as float32. The others are integers times scales, and
// are multiplied by activations that are rounded to eight bits.
enum class Storage { float32, bfloat16, float16, int8, int4 };

const char* name_of(Storage storage);

// Chunk c holds the outputs from c * kChunk on, padded by zeros:
//   float kinds  [inputs][kChunk] numbers.
//   int8         [depth / 4][kChunk][4] bytes: four inputs of an output lie together. One scale an output.
//   int4         for each group of inputs: [group / 8][kChunk][4] bytes, the low half of byte j the weight of
//   input j
//                of eight, the high half that of input 4 + j; [kChunk] scales in float16; and, unless
//                symmetric, [kChunk] minimums in float16. The weight is scale * value + minimum; symmetric
//                ones have no minimum but value - 8.
struct PackedMatrix {
    Storage storage;
    int64_t outputs, inputs;
    int64_t group;   // inputs that share a scale; int4 only
    bool symmetric;  // int4 only
    const uint8_t* data;
    const float* scales;  // int8 only, (chunks * kChunk,)

    int64_t chunks() const { return (outputs + kChunk - 1) / kChunk; }
    // Inputs with their padding.
    int64_t depth() const { return storage >= Storage::int8 ? round_up(inputs, kDepthUnit) : inputs; }
    int64_t group_bytes() const { return kChunk * (group / 2 + (symmetric ? 2 : 4)); }
    int64_t chunk_bytes() const {
        switch (storage) {
            case Storage::float32:
                return inputs * kChunk * 4;
            case Storage::bfloat16:
            case Storage::float16:
                return inputs * kChunk * 2;
            case Storage::int8:
                return depth() * kChunk;
            default:
                return depth() / group * group_bytes();
        }
    }
    const uint8_t* chunk(int64_t c) const { return data + c * chunk_bytes(); }
};

// Memory on a boundary of 64 bytes, in large pages where the system has them.
class AlignedBytes {
  public:
    explicit AlignedBytes(int64_t size);
    uint8_t* data() const { return data_.get(); }
    int64_t size() const { return size_; }

  private:
    struct Free {
        void operator()(uint8_t* data) const;
    };
    int64_t size_;
    std::unique_ptr<uint8_t, Free> data_;
};

// Where packing reads a weight (outputs, inputs) in rows, each `stride` elements from the last.
struct FloatSource {
    const void* data;  // float32, or 16 bits of the kind that is packed
    int64_t stride;
};
struct Int8Source {
    const int8_t* values;
    int64_t stride;
};
// Two values a byte, the even input in the low half; scales and minimums (outputs, inputs / group) in
// float16.
struct Int4Source {
    const uint8_t* values;
    int64_t stride;  // bytes
    const uint16_t *scales, *minimums;
};

// Fills a chunk of a matrix of the given shape, and of its kind. order: the source's row of each output, -1
// for a row of zeros.
void pack_chunk(const PackedMatrix& shape, const FloatSource& source, const int64_t* order, int64_t chunk,
                uint8_t* out);
void pack_chunk(const PackedMatrix& shape, const Int8Source& source, const int64_t* order, int64_t chunk,
                uint8_t* out);
void pack_chunk(const PackedMatrix& shape, const Int4Source& source, const int64_t* order, int64_t chunk,
                uint8_t* out);

// Writes an output's row of weights, (inputs,), as float32.
void unpack_row(const PackedMatrix& matrix, int64_t output, float* out);

float float_of_half(uint16_t half);

}  // namespace tandem
