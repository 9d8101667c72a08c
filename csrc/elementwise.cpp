#include "elementwise.h"

#include <algorithm>

#include "parallel.h"

namespace tandem {
namespace {

constexpr int64_t kChunk = 16384;  // floats of a task: 64 KiB, some microseconds

// Calls body(begin, end) for the chunks of [0, n).
template <class Body>
void for_chunks(int64_t n, int64_t chunk, int num_threads, Body body) {
    parallel_for((n + chunk - 1) / chunk, num_threads,
                 [&](int64_t i) { body(i * chunk, std::min(n, (i + 1) * chunk)); });
}

}  // namespace

void activate(const Activation& activation, const float* x, float* out, int64_t n, int num_threads) {
    for_chunks(n, kChunk, num_threads,
               [&](int64_t begin, int64_t end) { activation.forward(x + begin, out + begin, end - begin); });
}

void differentiate(const Activation& activation, const float* x, const float* grad_out, float* grad_x,
                   int64_t n, int num_threads) {
    for_chunks(n, kChunk, num_threads, [&](int64_t begin, int64_t end) {
        activation.backward(x + begin, grad_out + begin, grad_x + begin, end - begin);
    });
}

void rotate(const Rotation& r, int num_threads) {
    const int64_t width = r.heads * 2 * r.half;
    if (width == 0) return;
    const auto rotate_token = elementwise_kernels().rotate;
    for_chunks(r.batch * r.tokens, std::max<int64_t>(1, kChunk / width), num_threads,
               [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                       const int64_t token = i % r.tokens;
                       const float* x = r.x + i / r.tokens * r.batch_stride + token * r.token_stride;
                       rotate_token({x, r.head_stride, r.out + i * width, r.cos + token * r.half,
                                     r.sin + token * r.half, r.heads, r.half, r.direction});
                   }
               });
}

}  // namespace tandem
