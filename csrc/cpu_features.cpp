#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tandem {
namespace {

constexpr CpuPath kPaths[] = {CpuPath::generic, CpuPath::avx2,        CpuPath::avx2_vnni,
                              CpuPath::avx512,  CpuPath::avx512_vnni, CpuPath::amx};

#if defined(__x86_64__)

// A bit of a register of CPUID's leaf 7; the compiler's own test knows too few names. `reg` is eax to edx, 0
// to 3.
bool cpuid_7(unsigned subleaf, int reg, int bit) {
    unsigned registers[4] = {};
    if (__get_cpuid_count(7, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]) == 0)
        return false;
    return (registers[reg] >> bit & 1u) != 0;
}

// Linux hands out the tiles' registers, 8 KiB of state a thread, to processes that ask for them.
bool may_use_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
}

bool cpu_has(CpuPath path) {
    switch (path) {
        case CpuPath::avx2:
            return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
                   __builtin_cpu_supports("f16c") != 0;
        case CpuPath::avx2_vnni:
            return cpu_has(CpuPath::avx2) && cpuid_7(1, 0, 4);
        case CpuPath::avx512:
            return cpu_has(CpuPath::avx2) && __builtin_cpu_supports("avx512f") != 0 &&
                   __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
                   __builtin_cpu_supports("avx512vl") != 0;
        case CpuPath::avx512_vnni:
            return cpu_has(CpuPath::avx512) && __builtin_cpu_supports("avx512vnni") != 0;
        case CpuPath::amx:
            return cpu_has(CpuPath::avx512_vnni) && cpuid_7(0, 3, 24) && cpuid_7(0, 3, 25) && may_use_tiles();
        default:
            return true;
    }
}

#else

bool cpu_has(CpuPath path) { return path == CpuPath::generic; }

#endif

CpuPath best_path() {
    CpuPath best = CpuPath::generic;
    for (CpuPath path : kPaths)
        if (cpu_has(path)) best = path;
    return best;
}

CpuPath choose_path() {
    const char* wanted = std::getenv("TANDEM_CPU");
    if (wanted == nullptr || *wanted == '\0') return best_path();
    std::string names;
    for (CpuPath path : kPaths) {
        names += (names.empty() ? "" : ", ") + std::string(name_of(path));
        if (std::string(wanted) != name_of(path)) continue;
        if (cpu_has(path)) return path;
        throw std::invalid_argument("TANDEM_CPU=" + std::string(wanted) + ": this CPU does not have it");
    }
    throw std::invalid_argument("TANDEM_CPU must be one of " + names + ", not " + std::string(wanted));
}

}  // namespace

CpuPath cpu_path() {
    static const CpuPath path = choose_path();
    return path;
}

const char* name_of(CpuPath path) {
    switch (path) {
        case CpuPath::amx:
            return "amx";
        case CpuPath::avx512_vnni:
            return "avx512_vnni";
        case CpuPath::avx512:
            return "avx512";
        case CpuPath::avx2_vnni:
            return "avx2_vnni";
        case CpuPath::avx2:
            return "avx2";
        default:
            return "generic";
    }
}

}  // namespace tandem
