// Threads that work side by side, on the OpenMP threads that torch's own loops run on.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>

namespace tandem {

// The members of one parallel region. All run the same code; a loop is shared out among them, and ends when
// all of it is done, so what one member wrote in a loop every member reads after it.
//
// A decoding step is a hundred short loops: shared out by a team each takes a fraction of what it takes to
// fork and join for it.
class Team {
  public:
    explicit Team(int size) : size_(size) {}
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Calls body(i) once for every i in [0, tasks), on whichever member comes first: threads take the next
    // task from a counter, so one that comes late just finds less to do. Every member must call it alike. An
    // exception is kept for `rethrow`, and the loop goes on.
    template <class Body>
    void for_each(int64_t tasks, const Body& body) {
        for (int64_t i = claim(); i < tasks; i = claim()) {
            try {
                body(i);
            } catch (...) {
                keep_error();
            }
        }
        wait();
    }

    // As for_each, with body(i, next): next is the task this member will do after i, or is not below `tasks`.
    template <class Body>
    void for_each_ahead(int64_t tasks, const Body& body) {
        for (int64_t i = claim(), next; i < tasks; i = next) {
            next = claim();
            try {
                body(i, next);
            } catch (...) {
                keep_error();
            }
        }
        wait();
    }

    // Calls body() on one member, and lets nobody on before it is done.
    template <class Body>
    void once(const Body& body) {
        for_each(1, [&](int64_t) { body(); });
    }

    // The first exception of any loop, once the members are done.
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

  private:
    int64_t claim() { return next_.fetch_add(1, std::memory_order_relaxed); }
    void keep_error();
    void wait();

    const int size_;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint64_t> round_{0};
    std::mutex mutex_;
    std::exception_ptr error_;
};

// Calls member(team) on up to num_threads threads, the caller among them, and returns when all are done. The
// first exception of the team's loops is rethrown; `member` itself must throw none. In a forked child the
// caller is alone.
void run_team(int num_threads, const std::function<void(Team&)>& member);

// How many threads are worth waking to read so many floats.
int threads_worth(int64_t floats, int num_threads);

// A team for one loop: calls body(i) once for every i in [0, tasks).
void parallel_for(int64_t tasks, int num_threads, const std::function<void(int64_t)>& body);

}  // namespace tandem
