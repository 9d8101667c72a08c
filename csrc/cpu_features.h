// Which set of vector instructions the kernels may use on this machine.
#pragma once

namespace tandem {

// From the plainest to the best. avx2_vnni and avx512_vnni multiply bytes (AVX-VNNI, AVX512-VNNI), amx tiles
// of bytes; kernels that have no use for those take the path below.
enum class CpuPath { generic, avx2, avx2_vnni, avx512, avx512_vnni, amx };

// The best path of this CPU, or the one named by the environment variable TANDEM_CPU. Throws
// std::invalid_argument if that name is unknown or the CPU lacks it. Decided once, at the first call.
CpuPath cpu_path();

const char* name_of(CpuPath path);

// Of a table for each kind of vectors, the one of cpu_path().
template <class Kernels>
const Kernels& on_this_cpu(const Kernels& generic, const Kernels& avx2, const Kernels& avx512) {
    if (cpu_path() >= CpuPath::avx512) return avx512;
    return cpu_path() >= CpuPath::avx2 ? avx2 : generic;
}

}  // namespace tandem
