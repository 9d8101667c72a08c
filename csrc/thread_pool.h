// A small pool of parked threads for loops over independent tasks.
#pragma once

#include <cstdint>
#include <functional>

namespace tandem {

// Calls body(i) once for every i in [0, tasks) on up to num_threads threads, the caller among them, and
// returns when all are done. Threads are started when first needed and sleep soon after; a forked child
// starts its own. If the pool is serving another caller, this one does its tasks alone instead of waiting.
// The first exception is rethrown.
void parallel_for(int64_t tasks, int num_threads, const std::function<void(int64_t)>& body);

}  // namespace tandem
