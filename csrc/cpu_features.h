// Which set of vector instructions the kernels may use on this machine.
#pragma once

namespace tandem {

enum class CpuPath { generic, avx2, avx512 };

// The best path of this CPU, or the one named by the environment variable TANDEM_CPU (generic, avx2, avx512).
// Throws std::invalid_argument if that name is unknown or the CPU lacks it. Decided once, at the first call.
CpuPath cpu_path();

const char* name_of(CpuPath path);

}  // namespace tandem
