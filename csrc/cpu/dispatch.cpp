// Chooses, once, the instruction set that runs.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "steppo/cpu.h"

namespace steppo::cpu {
namespace {

enum Isa : int { kBaseline, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa best() {
#if defined(STEPPO_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? kAvx512 : avx2 ? kAvx2 : kBaseline;
#else
  return kBaseline;
#endif
}

struct Choice {
  Isa isa;
  std::string error;  // why it is not what STEPPO_ISA asks for
};

// Does not throw: the pointers below are set while the library is being loaded, where nobody could
// catch it.
Choice choose() {
  const Isa most = best();
  const char* given = std::getenv("STEPPO_ISA");
  const std::string wanted = given == nullptr ? "" : given;
  if (wanted.empty()) return {most, ""};
  std::string error = "STEPPO_ISA: got '" + wanted + "', expected what this CPU runs:";
  for (int isa = kBaseline; isa <= most; ++isa) {
    if (wanted == kNames[isa]) return {static_cast<Isa>(isa), ""};
    error += std::string(isa == kBaseline ? " " : ", ") + kNames[isa];
  }
  return {most, error};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

template <class F>
F* select(F* baseline, [[maybe_unused]] F* avx2, [[maybe_unused]] F* avx512) {
  return chosen().isa == kAvx512 ? avx512 : chosen().isa == kAvx2 ? avx2 : baseline;
}

}  // namespace

const char* isa() {
  if (!chosen().error.empty()) throw std::invalid_argument(chosen().error);
  return kNames[chosen().isa];
}

bool multiplies_bf16() {
#if defined(STEPPO_X86) && __has_include(<avx512bf16intrin.h>)
  return chosen().isa == kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const char* isas() {
#if defined(STEPPO_X86)
  return "baseline, avx2, avx512";
#else
  return "baseline";
#endif
}

#if defined(STEPPO_X86)
#define STEPPO_OPERATOR(name, ...) \
  decltype(&baseline::name) const name = select(&baseline::name, &avx2::name, &avx512::name);
#else
#define STEPPO_OPERATOR(name, ...) decltype(&baseline::name) const name = &baseline::name;
#endif
#include "steppo/cpu_operators.inc"
#undef STEPPO_OPERATOR

}  // namespace steppo::cpu
