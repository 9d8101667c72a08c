#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace tandem {
namespace {

bool cpu_has(CpuPath path) {
    if (path == CpuPath::generic) return true;
#if defined(__x86_64__)
    if (path == CpuPath::avx2)
        return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
    return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
           __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
#else
    return false;
#endif
}

CpuPath best_path() {
    for (CpuPath path : {CpuPath::avx512, CpuPath::avx2})
        if (cpu_has(path)) return path;
    return CpuPath::generic;
}

CpuPath choose_path() {
    const char* wanted = std::getenv("TANDEM_CPU");
    if (wanted == nullptr || *wanted == '\0') return best_path();
    for (CpuPath path : {CpuPath::generic, CpuPath::avx2, CpuPath::avx512}) {
        if (std::string(wanted) != name_of(path)) continue;
        if (cpu_has(path)) return path;
        throw std::invalid_argument("TANDEM_CPU=" + std::string(wanted) + ": this CPU does not have it");
    }
    throw std::invalid_argument("TANDEM_CPU must be generic, avx2 or avx512, not " + std::string(wanted));
}

}  // namespace

CpuPath cpu_path() {
    static const CpuPath path = choose_path();
    return path;
}

const char* name_of(CpuPath path) {
    switch (path) {
        case CpuPath::avx512:
            return "avx512";
        case CpuPath::avx2:
            return "avx2";
        default:
            return "generic";
    }
}

}  // namespace tandem
