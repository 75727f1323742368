// Which instruction set kernels with a body of their own per set use.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace rlkern {

enum class Isa { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

// The widest that this CPU has; RLKERN_CPU_ISA=default|avx2|avx512 holds it back.
inline Isa choose_isa() {
  Isa isa = Isa::kDefault;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isa = Isa::kAvx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    isa = __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
#endif
  const char* wanted = std::getenv("RLKERN_CPU_ISA");
  const std::string_view name = wanted ? wanted : "";
  if (name == "default") isa = Isa::kDefault;
  if (name == "avx2") isa = std::min(isa, Isa::kAvx2);
  if (name == "avx512") isa = std::min(isa, Isa::kAvx512);
  return isa;
}

inline Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace rlkern
