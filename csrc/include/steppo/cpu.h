// The C++ API of the CPU kernels: raw pointers and sizes, no torch, no Python.
//
// Each operator of cpu_operators.inc exists once per instruction set, in a namespace of its own,
// and as a function pointer `steppo::cpu::<operator>` to the best one that this CPU runs. Callers
// hold a StandardFloats of steppo/floats.h, which is the mode of the threads that help.
#pragma once

#include "steppo/arguments.h"

namespace steppo::cpu {

#define STEPPO_OPERATOR(name, ...) Operator<__VA_ARGS__> name;
namespace baseline {
#include "steppo/cpu_operators.inc"
}
#if defined(STEPPO_X86)
namespace avx2 {
#include "steppo/cpu_operators.inc"
}
namespace avx512 {
#include "steppo/cpu_operators.inc"
}
#endif
#undef STEPPO_OPERATOR

// The instruction set that runs: "avx512", "avx2" or "baseline". The environment variable
// STEPPO_ISA lowers it; std::invalid_argument says so if it asks for what this CPU does not run.
const char* isa();

// The instruction sets that were compiled.
const char* isas();

// Whether head_logits runs here: it takes AVX512_BF16, and there is no other form of it.
bool multiplies_bf16();

// Asks for huge pages for memory that is about to be written in full. The first write to a small
// page of fresh memory takes about ten times as long as the numbers that fill it.
void prefer_huge_pages(void* data, int64_t bytes);

#define STEPPO_OPERATOR(name, ...) extern decltype(&baseline::name) const name;
#include "steppo/cpu_operators.inc"
#undef STEPPO_OPERATOR

}  // namespace steppo::cpu
