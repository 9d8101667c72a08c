// OpenMP rather than threads of our own: torch's workers spin for a while after each of its loops, and a
// second set of threads would have to share their cores. Loaded after torch, this module shares its OpenMP
// runtime.
#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

namespace tandem {
namespace {

// Threads take the next task from a counter, so one that comes late just finds less to do.
class Loop {
  public:
    Loop(int64_t tasks, const std::function<void(int64_t)>& body) : tasks_(tasks), body_(body) {}

    void work() noexcept {
        for (int64_t i = next_++; i < tasks_; i = next_++) {
            try {
                body_(i);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex_);
                if (!error_) error_ = std::current_exception();
            }
        }
    }

    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

  private:
    const int64_t tasks_;
    const std::function<void(int64_t)>& body_;
    std::atomic<int64_t> next_{0};
    std::mutex mutex_;
    std::exception_ptr error_;
};

// A child of fork has none of the runtime's threads, but the runtime does not know.
std::atomic<bool> forked{false};

bool may_fork_out() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
    static_cast<void>(registered);
    return !forked;
}

}  // namespace

void parallel_for(int64_t tasks, int num_threads, const std::function<void(int64_t)>& body) {
    Loop loop(tasks, body);
    const int threads = static_cast<int>(std::min<int64_t>(num_threads, tasks));
    if (threads > 1 && may_fork_out()) {
#pragma omp parallel num_threads(threads)
        loop.work();
    } else {
        loop.work();
    }
    loop.rethrow();
}

}  // namespace tandem
