// Chooses, once, the instruction set that runs.
#include <cstdlib>
#include <cstring>

#include "steppo/cpu.h"

namespace steppo::cpu {
namespace {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa best() {
#if defined(STEPPO_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const Isa found = avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
  const char* wanted = std::getenv("STEPPO_ISA");
  if (wanted == nullptr) return found;
  if (std::strcmp(wanted, "baseline") == 0) return Isa::kBaseline;
  if (std::strcmp(wanted, "avx2") == 0 && avx2) return Isa::kAvx2;
  return found;
#else
  return Isa::kBaseline;
#endif
}

Isa chosen() {
  static const Isa isa = best();
  return isa;
}

template <class F>
F* select(F* baseline, [[maybe_unused]] F* avx2, [[maybe_unused]] F* avx512) {
  return chosen() == Isa::kAvx512 ? avx512 : chosen() == Isa::kAvx2 ? avx2 : baseline;
}

}  // namespace

const char* isa() {
  return chosen() == Isa::kAvx512 ? "avx512" : chosen() == Isa::kAvx2 ? "avx2" : "baseline";
}

const char* isas() {
#if defined(STEPPO_X86)
  return "baseline, avx2, avx512";
#else
  return "baseline";
#endif
}

#if defined(STEPPO_X86)
#define STEPPO_OP(name) \
  decltype(&baseline::name) const name = select(&baseline::name, &avx2::name, &avx512::name);
#else
#define STEPPO_OP(name) decltype(&baseline::name) const name = &baseline::name;
#endif
#include "steppo/cpu_op_names.inc"
#undef STEPPO_OP

}  // namespace steppo::cpu
