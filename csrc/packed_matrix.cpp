#include "packed_matrix.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace tandem {
namespace {

constexpr int64_t kLargePage = int64_t{1} << 21;

// The source's row of output n of a chunk, or -1 past the end.
int64_t row_of(const PackedMatrix& shape, const int64_t* order, int64_t output) {
    return output < shape.outputs ? order[output] : -1;
}

// A few inputs at a time, whose part of the chunk the first-level cache holds for all outputs.
constexpr int64_t kPackedAtOnce = 32;

template <class Number>
void pack_numbers(const PackedMatrix& shape, const FloatSource& source, const int64_t* order, int64_t chunk,
                  Number* out) {
    const auto* numbers = static_cast<const Number*>(source.data);
    for (int64_t first = 0; first < shape.inputs; first += kPackedAtOnce) {
        const int64_t end = std::min(shape.inputs, first + kPackedAtOnce);
        for (int64_t n = 0; n < kChunk; ++n) {
            const int64_t row = row_of(shape, order, chunk * kChunk + n);
            for (int64_t k = first; k < end; ++k)
                out[k * kChunk + n] = row < 0 ? Number{} : numbers[row * source.stride + k];
        }
    }
}

struct Int4Group {
    const uint8_t* values;
    const uint8_t *scales, *minimums;
};

Int4Group group_of(const PackedMatrix& matrix, int64_t chunk, int64_t group) {
    const uint8_t* begin = matrix.chunk(chunk) + group * matrix.group_bytes();
    const uint8_t* scales = begin + kChunk * matrix.group / 2;
    return {begin, scales, scales + kChunk * 2};
}

float half_at(const uint8_t* place) {
    uint16_t half;
    std::memcpy(&half, place, sizeof half);
    return float_of_half(half);
}

void unpack_int4(const PackedMatrix& matrix, int64_t output, float* out) {
    const int64_t n = output % kChunk;
    for (int64_t g = 0; g < matrix.inputs / matrix.group; ++g, out += matrix.group) {
        const Int4Group group = group_of(matrix, output / kChunk, g);
        const float scale = half_at(group.scales + n * 2);
        const float minimum = matrix.symmetric ? -8 * scale : half_at(group.minimums + n * 2);
        for (int64_t k = 0; k < matrix.group; ++k) {
            const uint8_t byte = group.values[(k / 8 * kChunk + n) * 4 + k % 4];
            out[k] = scale * static_cast<float>(k % 8 < 4 ? byte & 15 : byte >> 4) + minimum;
        }
    }
}

void unpack_int8(const PackedMatrix& matrix, int64_t output, float* out) {
    const uint8_t* bytes = matrix.chunk(output / kChunk) + output % kChunk * 4;
    const float scale = matrix.scales[output];
    for (int64_t k = 0; k < matrix.inputs; ++k)
        out[k] = static_cast<float>(bytes[k / 4 * 4 * kChunk + k % 4] - kByteOffset) * scale;
}

template <class Number, class Widen>
void unpack_numbers(const PackedMatrix& matrix, int64_t output, Widen widen, float* out) {
    const uint8_t* bytes =
        matrix.chunk(output / kChunk) + output % kChunk * static_cast<int64_t>(sizeof(Number));
    for (int64_t k = 0; k < matrix.inputs; ++k) {
        Number number;
        std::memcpy(&number, bytes + k * kChunk * static_cast<int64_t>(sizeof number), sizeof number);
        out[k] = widen(number);
    }
}

float float_of_bfloat(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float number;
    std::memcpy(&number, &wide, sizeof number);
    return number;
}

}  // namespace

const char* name_of(Storage storage) {
    constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int8", "int4"};
    return kNames[static_cast<int>(storage)];
}

AlignedBytes::AlignedBytes(int64_t size) : size_(size) {
    const int64_t unit = size >= kLargePage ? kLargePage : 64;
    // Not aligned_alloc, which takes whole multiples of the unit alone.
    void* memory = nullptr;
    if (posix_memalign(&memory, static_cast<size_t>(unit),
                       static_cast<size_t>(round_up(std::max<int64_t>(size, 1), 64))) != 0)
        throw std::bad_alloc();
    if (unit == kLargePage) madvise(memory, static_cast<size_t>(size), MADV_HUGEPAGE);
    data_.reset(static_cast<uint8_t*>(memory));
}

void AlignedBytes::Free::operator()(uint8_t* data) const { std::free(data); }

void pack_chunk(const PackedMatrix& shape, const FloatSource& source, const int64_t* order, int64_t chunk,
                uint8_t* out) {
    if (shape.storage == Storage::float32)
        pack_numbers(shape, source, order, chunk, reinterpret_cast<uint32_t*>(out));
    else
        pack_numbers(shape, source, order, chunk, reinterpret_cast<uint16_t*>(out));
}

void pack_chunk(const PackedMatrix& shape, const Int8Source& source, const int64_t* order, int64_t chunk,
                uint8_t* out) {
    std::memset(out, kByteOffset, static_cast<size_t>(shape.chunk_bytes()));
    for (int64_t n = 0; n < kChunk; ++n) {
        const int64_t row = row_of(shape, order, chunk * kChunk + n);
        for (int64_t k = 0; row >= 0 && k < shape.inputs; ++k)
            out[(k / 4 * kChunk + n) * 4 + k % 4] =
                static_cast<uint8_t>(source.values[row * source.stride + k] + kByteOffset);
    }
}

void pack_chunk(const PackedMatrix& shape, const Int4Source& source, const int64_t* order, int64_t chunk,
                uint8_t* out) {
    // Padding is a weight of zero: its scale and minimum are.
    std::memset(out, 0, static_cast<size_t>(shape.chunk_bytes()));
    const int64_t groups = shape.inputs / shape.group;
    for (int64_t n = 0; n < kChunk; ++n) {
        const int64_t row = row_of(shape, order, chunk * kChunk + n);
        for (int64_t g = 0; row >= 0 && g < groups; ++g) {
            uint8_t* values = out + g * shape.group_bytes();
            uint8_t* scales = values + kChunk * shape.group / 2;
            const uint8_t* from = source.values + row * source.stride + g * shape.group / 2;
            for (int64_t k = 0; k < shape.group; ++k) {
                const int value = k % 2 == 0 ? from[k / 2] & 15 : from[k / 2] >> 4;
                values[(k / 8 * kChunk + n) * 4 + k % 4] |=
                    static_cast<uint8_t>(k % 8 < 4 ? value : value << 4);
            }
            std::memcpy(scales + n * 2, source.scales + row * groups + g, 2);
            if (!shape.symmetric)
                std::memcpy(scales + kChunk * 2 + n * 2, source.minimums + row * groups + g, 2);
        }
    }
}

void unpack_row(const PackedMatrix& matrix, int64_t output, float* out) {
    switch (matrix.storage) {
        case Storage::float32:
            return unpack_numbers<float>(matrix, output, [](float number) { return number; }, out);
        case Storage::bfloat16:
            return unpack_numbers<uint16_t>(matrix, output, float_of_bfloat, out);
        case Storage::float16:
            return unpack_numbers<uint16_t>(matrix, output, float_of_half, out);
        case Storage::int8:
            return unpack_int8(matrix, output, out);
        case Storage::int4:
            return unpack_int4(matrix, output, out);
    }
}

// Normal numbers by moving exponent and mantissa to their places; subnormal ones are mantissa * 2^-24.
float float_of_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = half >> 10 & 31u, mantissa = half & 1023u;
    uint32_t bits;
    if (exponent == 0) {
        const float small = static_cast<float>(mantissa) * 0x1p-24f;
        std::memcpy(&bits, &small, sizeof bits);
    } else {
        bits = (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
    }
    bits |= sign;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

}  // namespace tandem
