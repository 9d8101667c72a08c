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

template <class Number>
void pack_numbers(const PackedMatrix& shape, const FloatSource& source, const int64_t* order, int64_t chunk,
                  Number* out) {
    const auto* numbers = static_cast<const Number*>(source.data);
    for (int64_t n = 0; n < kChunk; ++n) {
        const int64_t row = row_of(shape, order, chunk * kChunk + n);
        for (int64_t k = 0; k < shape.inputs; ++k)
            out[k * kChunk + n] = row < 0 ? Number{} : numbers[row * source.stride + k];
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

float int4_at(const PackedMatrix& matrix, int64_t output, int64_t k) {
    const int64_t n = output % kChunk;
    const Int4Group group = group_of(matrix, output / kChunk, k / matrix.group);
    const int64_t within = k % matrix.group;
    const uint8_t byte = group.values[(within / 8 * kChunk + n) * 4 + within % 4];
    const int value = within % 8 < 4 ? byte & 15 : byte >> 4;
    const float scale = half_at(group.scales + n * 2);
    if (matrix.symmetric) return scale * static_cast<float>(value - 8);
    return scale * static_cast<float>(value) + half_at(group.minimums + n * 2);
}

float float_at(const PackedMatrix& matrix, int64_t output, int64_t k) {
    const int64_t place = k * kChunk + output % kChunk;
    const uint8_t* chunk = matrix.chunk(output / kChunk);
    if (matrix.storage == Storage::float32) {
        float number;
        std::memcpy(&number, chunk + place * 4, sizeof number);
        return number;
    }
    uint16_t bits;
    std::memcpy(&bits, chunk + place * 2, sizeof bits);
    if (matrix.storage == Storage::float16) return float_of_half(bits);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float number;
    std::memcpy(&number, &wide, sizeof number);
    return number;
}

float int8_at(const PackedMatrix& matrix, int64_t output, int64_t k) {
    const uint8_t byte = matrix.chunk(output / kChunk)[(k / 4 * kChunk + output % kChunk) * 4 + k % 4];
    return static_cast<float>(byte - kByteOffset) * matrix.scales[output];
}

}  // namespace

const char* name_of(Storage storage) {
    constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int8", "int4"};
    return kNames[static_cast<int>(storage)];
}

AlignedBytes::AlignedBytes(int64_t size) : size_(size) {
    const int64_t unit = size >= 2 * kLargePage ? kLargePage : 64;
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
    for (int64_t k = 0; k < matrix.inputs; ++k) switch (matrix.storage) {
            case Storage::int8:
                out[k] = int8_at(matrix, output, k);
                break;
            case Storage::int4:
                out[k] = int4_at(matrix, output, k);
                break;
            default:
                out[k] = float_at(matrix, output, k);
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
