// The module steppo_kernels._C_cpu: every operator of csrc/include/steppo/cpu_operators.inc.
#include "cast.h"
#include "steppo/cpu.h"

PYBIND11_MODULE(_C_cpu, m) {
  m.doc() =
      "CPU kernels of steppo_kernels on raw pointers; see csrc/include/steppo/cpu_operators.inc";
  m.def("isa", &steppo::cpu::isa);
  m.def("isas", &steppo::cpu::isas);
  m.def("multiplies_bf16", &steppo::cpu::multiplies_bf16);
  m.def("compiler", [] { return STEPPO_COMPILER; });
  m.attr("operators") = pybind11::dict();
  m.attr("records") = pybind11::dict();
#define STEPPO_OPERATOR(name, ...) steppo::binding::def(m, #name, steppo::cpu::name);
#include "steppo/cpu_operators.inc"
#undef STEPPO_OPERATOR
}
