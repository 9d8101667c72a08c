#include "program.h"

#include <algorithm>
#include <chrono>

namespace tandem {
namespace {

constexpr int64_t kFloatsOfLine = 16;

using Clock = std::chrono::steady_clock;

}  // namespace

int Activations::add_floats(int64_t width) {
    floats_.push_back({width, round_up(width, kFloatsOfLine), nullptr});
    return static_cast<int>(floats_.size()) - 1;
}

int Activations::add_bytes(int64_t stride, int64_t groups) {
    bytes_.push_back({stride, groups, nullptr, {}, {}, {}});
    return static_cast<int>(bytes_.size()) - 1;
}

void Activations::reserve(int64_t rows) {
    if (rows <= rows_) return;
    rows_ = round_up(std::max(rows, rows_ * 3 / 2), kRowUnit);
    for (Floats& buffer : floats_) {
        buffer.memory.reset();  // before the next is there, for the peak counts
        buffer.memory =
            std::make_unique<AlignedBytes>(rows_ * buffer.stride * static_cast<int64_t>(sizeof(float)));
    }
    for (Bytes& buffer : bytes_) {
        buffer.memory.reset();
        buffer.memory = std::make_unique<AlignedBytes>(rows_ * buffer.stride + kByteSlack);
        buffer.scales.resize(static_cast<size_t>(rows_));
        buffer.sums.resize(static_cast<size_t>(rows_ * buffer.groups));
        buffer.outliers.resize(static_cast<size_t>(rows_ * kOutliers));
    }
}

int64_t Activations::nbytes() const {
    int64_t total = 0;
    for (const Floats& buffer : floats_) total += buffer.memory ? buffer.memory->size() : 0;
    for (const Bytes& buffer : bytes_) total += buffer.memory ? buffer.memory->size() : 0;
    return total;
}

ByteRows Activations::bytes(int id) const {
    const Bytes& buffer = bytes_[static_cast<size_t>(id)];
    return {reinterpret_cast<int8_t*>(buffer.memory->data()),
            buffer.stride,
            const_cast<float*>(buffer.scales.data()),
            const_cast<int32_t*>(buffer.sums.data()),
            buffer.groups,
            const_cast<Outlier*>(buffer.outliers.data())};
}

void Program::run(const Step& step, int num_threads) {
    if (step.tokens == 0) return;
    const std::lock_guard<std::mutex> turn(mutex_);
    activations.reserve(std::max(step.tokens, step.num_selected));
    const auto start = Clock::now();
    std::atomic<bool> timed{false};
    run_team(num_threads, [&](Team& team) {
        const bool keeps_time = !timed.exchange(true);  // one member does
        auto last = start;
        for (const auto& op : ops_) {
            op->run(step, activations, team);
            if (!keeps_time) continue;
            const auto now = Clock::now();
            seconds_[static_cast<size_t>(op->kind())] += std::chrono::duration<double>(now - last).count();
            last = now;
        }
    });
}

std::array<double, 3> Program::take_seconds() {
    const std::lock_guard<std::mutex> turn(mutex_);
    const std::array<double, 3> seconds = seconds_;
    seconds_ = {};
    return seconds;
}

}  // namespace tandem
