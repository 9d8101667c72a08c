// OpenMP rather than threads of our own: torch's workers spin for a while after each of its loops, and a
// second set of threads would have to share their cores. Loaded after torch, this module shares its OpenMP
// runtime.
#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <memory>

#if defined(TANDEM_STANDARD_THREADS)
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tandem {
namespace {

// Looks at the others' progress so often, some 20 us, before it lets the scheduler run another thread: longer
// than any member is late by, unless its core was taken away.
constexpr int kSpins = 500;

void pause() {
#if defined(__SSE2__)
    _mm_pause();
#endif
}

// A child of fork has none of the runtime's threads, but the runtime does not know.
std::atomic<bool> forked{false};

bool may_fork_out() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
    static_cast<void>(registered);
    return !forked;
}

// Makes a team of the threads there are, num_threads at most, and has each call member(team).
#if defined(TANDEM_STANDARD_THREADS)
void fork_out(int num_threads, const std::function<void(Team&)>& member, std::unique_ptr<Team>& team) {
    team = std::make_unique<Team>(num_threads);
    std::vector<std::thread> others;
    for (int i = 1; i < num_threads; ++i) others.emplace_back([&] { member(*team); });
    member(*team);
    for (std::thread& other : others) other.join();
}
#else
void fork_out(int num_threads, const std::function<void(Team&)>& member, std::unique_ptr<Team>& team) {
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp single
        team = std::make_unique<Team>(omp_get_num_threads());
        member(*team);
    }
}
#endif

// About 40 us of reading by one thread, what it takes to wake another.
constexpr int64_t kFloatsWorthAThread = int64_t{1} << 18;

}  // namespace

void Team::keep_error() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
}

void Team::wait() {
    const uint64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        next_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
        if (spins < kSpins)
            pause();
        else
            sched_yield();
}

void run_team(int num_threads, const std::function<void(Team&)>& member) {
    std::unique_ptr<Team> team;
    if (num_threads > 1 && may_fork_out()) {
        fork_out(num_threads, member, team);
    } else {
        team = std::make_unique<Team>(1);
        member(*team);
    }
    team->rethrow();
}

int threads_worth(int64_t floats, int num_threads) {
    return static_cast<int>(std::min<int64_t>(num_threads, 1 + floats / kFloatsWorthAThread));
}

void parallel_for(int64_t tasks, int num_threads, const std::function<void(int64_t)>& body) {
    const auto threads = static_cast<int>(std::min<int64_t>(num_threads, tasks));
    run_team(threads, [&](Team& team) { team.for_each(tasks, body); });
}

}  // namespace tandem
