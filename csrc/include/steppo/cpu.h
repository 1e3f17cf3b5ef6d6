// The C++ API of the CPU kernels: raw pointers and sizes, no torch, no Python.
//
// Each operator exists once per instruction set, in a namespace of its own (cpu_ops.inc is the
// list), and as a function pointer `steppo::cpu::<op>` to the best one that this CPU runs. Callers
// hold a StandardFloats of steppo/floats.h, which is the mode of the threads that help.
#pragma once

#include "steppo/types.h"

namespace steppo::cpu {

namespace baseline {
#include "steppo/cpu_ops.inc"
}
#if defined(STEPPO_X86)
namespace avx2 {
#include "steppo/cpu_ops.inc"
}
namespace avx512 {
#include "steppo/cpu_ops.inc"
}
#endif

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

#define STEPPO_OP(name) extern decltype(&baseline::name) const name;
#include "steppo/cpu_op_names.inc"
#undef STEPPO_OP

}  // namespace steppo::cpu
