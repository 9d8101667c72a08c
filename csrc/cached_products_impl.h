// The two products of attention over cached pages, compiled once a CPU path: queries with keys, weights with
// values. Cached elements become floats on their way into the registers.
//
// Every element of a product is one chain of fused multiply-adds, over head_dim or over keys in order, so its
// bits do not depend on the rows and pages that are handled together.
#pragma once

#include "attention_rows_impl.h"
#include "cached_attention_kernels.h"

namespace tandem {
namespace {

// Sums kept in registers, of 32 or 16, and the rows of a tile: enough sums for two vectors of each row.
#if defined(__AVX512F__)
constexpr int kSums = 16;
constexpr int kQueryRows = 8;
#elif defined(__AVX2__)
constexpr int kSums = 8;
constexpr int kQueryRows = 4;
#else
constexpr int kSums = 8;
constexpr int kQueryRows = 2;
#endif
static_assert(kQueryRows <= kMostTileRows);

// From a row of scores to the next: a segment, and an odd number of cache lines between rows.
constexpr int64_t kScoreStride = kSegment + kPage;
constexpr int64_t kRowStride = kMaxHeadDim;  // of queries, and of sums of values

// Elements of the cache as wide integers. Intrinsics, for GCC 12 compiles __builtin_convertvector to widen
// them one by one; masked ones with AVX-512, for it warns of the plain ones (GCC bug 105593).
inline Bits load_wide(const uint16_t* p) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return reinterpret_cast<Bits>(_mm512_maskz_cvtepu16_epi32(0xffff, half));
#elif defined(__AVX2__)
    return reinterpret_cast<Bits>(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    Bits wide;
    for (int i = 0; i < kWidth; ++i) wide[i] = p[i];
    return wide;
#endif
}

inline Ints load_wide(const int8_t* p) {
#if defined(__AVX512F__)
    const __m128i quarter = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<Ints>(_mm512_maskz_cvtepi8_epi32(0xffff, quarter));
#elif defined(__AVX2__)
    return reinterpret_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    Ints wide;
    for (int i = 0; i < kWidth; ++i) wide[i] = p[i];
    return wide;
#endif
}

// Elements of the cache, bfloat16 as its bits, as floats.
inline Vec load_cached(const float* p) { return load(p); }
inline Vec load_cached(const uint16_t* p) { return reinterpret_cast<Vec>(load_wide(p) << 16); }
inline Vec load_cached(const int8_t* p) { return __builtin_convertvector(load_wide(p), Vec); }

// The pages of a kv head that hold some keys of a segment.
struct Pages {
    int64_t first, count;  // in the sequence
    int64_t part;          // bytes from keys to values
    int64_t ahead;         // and from those to the keys of the next head; 0 where there is none
    const std::byte* keys[kSegment / kPage];

    Pages(const CachedHead& head, KeyRange range)
        : first(range.begin / kPage),
          count((range.end + kPage - 1) / kPage - first),
          part(part_bytes(head.cache.type, head.cache.head_dim)),
          ahead(head.kv_head + 1 < head.cache.kv_heads ? part : 0) {
        const int64_t per_block = head.cache.pages_per_block();
        int64_t entry = first / per_block, page = first % per_block;
        for (int64_t i = 0; i < count; ++i) {
            keys[i] = head.cache.keys(head.blocks[entry], page, head.kv_head);
            if (++page < per_block) continue;
            page = 0;
            ++entry;
        }
    }

    const std::byte* values(int64_t i) const { return keys[i] + part; }
};

// Asks for the line `ahead` bytes behind p: what is read next, for the products of one page are followed by
// those of its next part. Hardware follows no stream past a page of memory, and a part may be no longer.
inline void prefetch(const void* p, int64_t ahead) {
    __builtin_prefetch(static_cast<const char*>(p) + ahead);
}

// How many vectors of each of `rows` rows are summed at once.
constexpr int vectors_for(int rows, int most) { return kSums / rows < most ? kSums / rows : most; }

// Without the pragmas GCC 12 unrolls these loops too late to keep `sums` out of memory before and after.

// Scores of kRows rows with kPages pages of keys; the rows of q lie kRowStride apart.
template <class T, int kRows, int kPages>
inline void multiply_pages(const std::byte* const* pages, int64_t ahead, const float* q, int64_t head_dim,
                           float* scores) {
    constexpr int kVecs = kPages * kParts;
    const T* keys[kPages];
    Vec sums[kRows][kVecs];
#pragma GCC unroll 16
    for (int n = 0; n < kPages; ++n) keys[n] = reinterpret_cast<const T*>(pages[n]);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int n = 0; n < kVecs; ++n) sums[i][n] = splat(0.0f);
    for (int64_t d = 0; d < head_dim; ++d) {
        Vec key[kVecs];
#pragma GCC unroll 16
        for (int n = 0; n < kVecs; ++n)
            key[n] = load_cached(keys[n / kParts] + d * kPage + n % kParts * kWidth);
#pragma GCC unroll 16
        for (int n = 0; n < kPages; ++n) prefetch(keys[n] + d * kPage, ahead);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const Vec x = splat(q[i * kRowStride + d]);
#pragma GCC unroll 16
            for (int n = 0; n < kVecs; ++n) sums[i][n] = multiply_add(x, key[n], sums[i][n]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int n = 0; n < kVecs; ++n) store(scores + i * kScoreStride + n * kWidth, sums[i][n]);
}

// The pages from `begin` on, kPages at a time and the rest in halves of that.
template <class T, int kRows, int kPages>
inline void multiply_from(const Pages& pages, int64_t begin, const float* q, int64_t head_dim,
                          float* scores) {
    for (; begin + kPages <= pages.count; begin += kPages)
        multiply_pages<T, kRows, kPages>(pages.keys + begin, pages.part, q, head_dim, scores + begin * kPage);
    if constexpr (kPages > 1) multiply_from<T, kRows, kPages / 2>(pages, begin, q, head_dim, scores);
}

template <class T, int kRows>
void multiply_keys(const Pages& pages, const float* q, int64_t head_dim, float* scores) {
    constexpr int kFit = vectors_for(kRows, 8) / kParts;
    constexpr int kPages = kFit > 1 ? kFit : 1;
    multiply_from<T, kRows, kPages>(pages, 0, q, head_dim, scores);
}

// Adds the weighted values of keys in `range`, counted from the first of the pages, of which kVecs vectors,
// to the rows of out.
template <class T, int kRows, int kVecs>
inline void add_columns(const Pages& pages, KeyRange range, const float* weights, int64_t width,
                        int64_t column, float* out) {
    Vec sums[kRows][kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int n = 0; n < kVecs; ++n) sums[i][n] = load(out + i * kRowStride + column + n * kWidth);
    const int64_t ahead = pages.ahead;
    for (int64_t j = range.begin; j < range.end;) {
        const int64_t page = j / kPage, end = at_most((page + 1) * kPage, range.end);
        const T* values = reinterpret_cast<const T*>(pages.values(page)) + j % kPage * width + column;
        for (; j < end; ++j, values += width) {
            Vec value[kVecs];
#pragma GCC unroll 16
            for (int n = 0; n < kVecs; ++n) value[n] = load_cached(values + n * kWidth);
            for (int n = 0; n < kVecs * kWidth; n += 64 / static_cast<int>(sizeof(T)))
                prefetch(values + n, ahead);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
                const Vec weight = splat(weights[i * kScoreStride + j]);
#pragma GCC unroll 16
                for (int n = 0; n < kVecs; ++n) sums[i][n] = multiply_add(weight, value[n], sums[i][n]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int n = 0; n < kVecs; ++n) store(out + i * kRowStride + column + n * kWidth, sums[i][n]);
}

// The columns from `column` on, kVecs vectors at a time and the rest in halves of that.
template <class T, int kRows, int kVecs>
inline void add_from(const Pages& pages, KeyRange range, const float* weights, int64_t width, int64_t column,
                     float* out) {
    for (; column + kVecs * kWidth <= width; column += kVecs * kWidth)
        add_columns<T, kRows, kVecs>(pages, range, weights, width, column, out);
    if constexpr (kVecs > 1) add_from<T, kRows, kVecs / 2>(pages, range, weights, width, column, out);
}

// A row's weights are those of all keys of the pages.
template <class T, int kRows>
void add_values(const Pages& pages, KeyRange range, const float* weights, int64_t width, float* out) {
    if (range.end <= range.begin) return;
    const int64_t first = pages.first * kPage;
    add_from<T, kRows, vectors_for(kRows, 8)>(pages, {range.begin - first, range.end - first}, weights, width,
                                              0, out);
}

// The products of a tile of 1, 2, 4 or 8 rows.
template <class T>
struct Products {
    void (*multiply_keys)(const Pages& pages, const float* q, int64_t head_dim, float* scores);
    void (*add_values)(const Pages& pages, KeyRange range, const float* weights, int64_t width, float* out);
};

template <class T, int kRows>
constexpr Products<T> kProductsOf = {multiply_keys<T, kRows>, add_values<T, kRows>};

// `rows` is a power of two, at most kQueryRows.
template <class T>
inline const Products<T>& products(int64_t rows) {
#if defined(__AVX512F__)
    if (rows == 8) return kProductsOf<T, 8>;
#endif
#if defined(__AVX2__)
    if (rows == 4) return kProductsOf<T, 4>;
#endif
    return rows == 2 ? kProductsOf<T, 2> : kProductsOf<T, 1>;
}

}  // namespace
}  // namespace tandem
