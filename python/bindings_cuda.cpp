// The module of the CUDA kernels: every operator of csrc/include/steppo/operators.inc.
#include "cast.h"
#include "steppo/cuda.h"

PYBIND11_MODULE(STEPPO_MODULE, m) {
  m.doc() = "CUDA kernels of steppo_kernels on raw pointers; see csrc/include/steppo/operators.inc";
  // The bytes of a workspace: those of its counters, and all.
  using steppo::cuda::Workspace;
  m.attr("workspace") = pybind11::make_tuple(sizeof(Workspace::counters), sizeof(Workspace));
  m.attr("operators") = pybind11::dict();
  m.attr("records") = pybind11::dict();
#define STEPPO_OPERATOR(name, ...) steppo::binding::def(m, #name, steppo::cuda::name);
#include "steppo/operators.inc"
#undef STEPPO_OPERATOR
}
