// Loops over independent tasks, on the threads that torch's own loops run on.
#pragma once

#include <cstdint>
#include <functional>

namespace tandem {

// Calls body(i) once for every i in [0, tasks) on up to num_threads threads, the caller among them, and
// returns when all are done. The first exception is rethrown. In a forked child the caller does it all.
void parallel_for(int64_t tasks, int num_threads, const std::function<void(int64_t)>& body);

}  // namespace tandem
