#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace tandem {
namespace {

// Waking a sleeping thread takes tens of microseconds, as long as a whole call, so a wait first looks on for
// as long.
constexpr auto kPatience = std::chrono::microseconds(50);

template <class Condition>
void look_on_until(Condition condition) {
    const auto limit = std::chrono::steady_clock::now() + kPatience;
    while (!condition() && std::chrono::steady_clock::now() < limit) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
}

// One loop. Threads take the next task from a counter, so a helper that wakes late just finds less to do.
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

class ThreadPool {
  public:
    // False if the pool is busy with another caller.
    bool try_run(Loop& loop, int helpers) {
        const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner) return false;
        open(loop, start_threads(helpers));
        loop.work();
        close();
        return true;
    }

  private:
    // Returns how many of the wanted helpers there are: fewer if the system refuses more threads.
    int start_threads(int wanted) {
        try {
            for (; started_ < wanted; ++started_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            return started_;
        }
        return wanted;
    }

    void open(Loop& loop, int helpers) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            loop_ = &loop;
            seats_ = helpers;
        }
        for (int i = 0; i < helpers; ++i) wake_.notify_one();
    }

    // No helper may still hold the loop when this returns: it lives on the caller's stack.
    void close() {
        std::unique_lock<std::mutex> lock(mutex_);
        seats_ = 0;
        lock.unlock();
        look_on_until([this] { return running_ == 0; });
        lock.lock();
        done_.wait(lock, [this] { return running_ == 0; });
    }

    [[noreturn]] void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [this] { return seats_ > 0; });
            --seats_;
            ++running_;
            Loop* loop = loop_;
            lock.unlock();
            loop->work();
            lock.lock();
            if (--running_ == 0) done_.notify_one();
            lock.unlock();
            look_on_until([this] { return seats_ > 0; });
            lock.lock();
        }
    }

    std::mutex owner_;
    int started_ = 0;  // guarded by owner_, the rest by mutex_
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Loop* loop_ = nullptr;
    // Changed under the mutex; atomic to be looked at without it.
    std::atomic<int> seats_{0};    // helpers the open loop still has room for
    std::atomic<int> running_{0};  // helpers inside the loop
};

std::atomic<ThreadPool*> the_pool{nullptr};

// Never destroyed: its threads sleep in it until the process ends. A child of fork has none of the parent's
// threads, and perhaps a locked mutex, so it forgets the pool and makes another.
ThreadPool& pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool = nullptr; });
    static_cast<void>(registered);
    ThreadPool* found = the_pool;
    if (found != nullptr) return *found;
    auto* made = new ThreadPool;
    if (the_pool.compare_exchange_strong(found, made)) return *made;
    delete made;
    return *found;
}

}  // namespace

void parallel_for(int64_t tasks, int num_threads, const std::function<void(int64_t)>& body) {
    Loop loop(tasks, body);
    const int helpers = static_cast<int>(std::min<int64_t>(num_threads, tasks)) - 1;
    if (helpers < 1 || !pool().try_run(loop, helpers)) loop.work();
    loop.rethrow();
}

}  // namespace tandem
