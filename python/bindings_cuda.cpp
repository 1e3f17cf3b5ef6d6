// The module steppo_kernels._C_cuda: every operator of csrc/include/steppo/cuda_operators.inc.
// Tests build it of the same kernels for the host.
#include "cast.h"
#include "steppo/cuda.h"

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() =
      "CUDA kernels of steppo_kernels on raw pointers; see csrc/include/steppo/cuda_operators.inc";
  m.attr("on_host") = steppo::cuda::kOnHost;
  // The compiler, and what it compiled for: "90" is machine code, "100+PTX" that and what a driver
  // makes machine code of newer GPUs from.
  m.attr("compiler") = STEPPO_COMPILER;
  m.attr("architectures") = STEPPO_ARCHITECTURES;
  // The bytes of a workspace: those of its counters, and all.
  using steppo::cuda::Workspace;
  m.attr("workspace") = pybind11::make_tuple(sizeof(Workspace::counters), sizeof(Workspace));
  m.def("versions", [] {
    const steppo::cuda::Versions found = steppo::cuda::versions();
    return pybind11::make_tuple(found.driver, found.runtime);
  });
  m.def("load", &steppo::cuda::load);
  m.def("num_kernels", &steppo::cuda::num_kernels);
  m.def("is_capturing", [](std::size_t stream) {
    return steppo::cuda::is_capturing(reinterpret_cast<void*>(stream));
  });
  m.attr("operators") = pybind11::dict();
  m.attr("records") = pybind11::dict();
#define STEPPO_OPERATOR(name, ...) steppo::binding::def(m, #name, steppo::cuda::name);
#include "steppo/cuda_operators.inc"
#undef STEPPO_OPERATOR
}
