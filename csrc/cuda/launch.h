// How operators launch kernels: on the device and the stream of a `Place`, without waiting.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "device.cuh"
#include "steppo/arguments.h"
#include "steppo/dispatch.h"

#if !defined(STEPPO_CUDA_ON_HOST)
#include <cuda_runtime.h>

#include <stdexcept>
#endif

namespace steppo::cuda {

// Whether an address is a multiple of 16 bytes, which a thread moves at once.
STEPPO_FN bool is_wide(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

// The most blocks of a launch whose blocks go through the work in turns: the same on every card. On
// the host tests set fewer, so that a small batch takes several turns.
inline std::int64_t most_blocks(std::int64_t usual) {
#if defined(STEPPO_CUDA_ON_HOST)
  return cuda_on_host::most_blocks(usual);
#else
  return usual;
#endif
}

// Every kernel that an operator can launch. A driver loads the code of a kernel when it is first
// asked for, and that is not the time of a capture: see `load` in steppo/cuda.h.
inline std::vector<const void*>& all_kernels() {
  static std::vector<const void*> kernels;
  return kernels;
}

// A kernel that stands in the list.
template <class... Parameters>
struct Kernel {
  void (*run)(Parameters...);
};

template <auto kernel>
struct Listing {
  static inline const bool is_done = [] {
    all_kernels().push_back(reinterpret_cast<const void*>(kernel));
    return true;
  }();
};

template <class... Parameters>
Kernel<Parameters...> kernel_of(void (*run)(Parameters...), bool) {
  return {run};
}

template <auto kernel>
auto listed() {
  return kernel_of(kernel, Listing<kernel>::is_done);
}

// Makes the device of a place the current one for as long as it lives. What fails is thrown as
// std::runtime_error with the name of the operator.
class Launcher {
 public:
  Launcher(const char* operator_name, const Place& place);
  ~Launcher();
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  // Launches `blocks` blocks of `threads` threads; nothing if there are none.
  template <class... Parameters, class... Arguments>
  void operator()(Kernel<Parameters...> kernel, int64_t blocks, int threads,
                  Arguments... arguments) const {
    if (blocks == 0) return;
#if defined(STEPPO_CUDA_ON_HOST)
    const uint3 grid{static_cast<unsigned>(blocks), 1, 1};
    cuda_on_host::launch(kernel.run, grid, {static_cast<unsigned>(threads), 1, 1}, arguments...);
#else
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(place_.stream);
    check(cudaLaunchKernelEx(&config, kernel.run, static_cast<Parameters>(arguments)...));
#endif
  }

#if !defined(STEPPO_CUDA_ON_HOST)
  void check(cudaError_t error) const;
#endif

 private:
  const char* name_;
  Place place_;
#if !defined(STEPPO_CUDA_ON_HOST)
  int before_ = -1;
#endif
};

#if defined(STEPPO_CUDA_ON_HOST)
inline Launcher::Launcher(const char* operator_name, const Place& place)
    : name_(operator_name), place_(place) {}
inline Launcher::~Launcher() = default;
#else
inline Launcher::Launcher(const char* operator_name, const Place& place)
    : name_(operator_name), place_(place) {
  int current = 0;
  check(cudaGetDevice(&current));
  if (current == place.device) return;
  check(cudaSetDevice(place.device));
  before_ = current;
}

inline Launcher::~Launcher() {
  if (before_ >= 0) cudaSetDevice(before_);
}

inline void Launcher::check(cudaError_t error) const {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(name_) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}
#endif

}  // namespace steppo::cuda
