// What the package asks of the CUDA runtime beside launches.
#include "launch.h"
#include "steppo/cuda.h"

namespace steppo::cuda {

const bool kOnHost = false;

Versions versions() {
  Versions found{};
  // Without a driver there is no error: its version is 0.
  if (cudaDriverGetVersion(&found.driver) != cudaSuccess) found.driver = 0;
  if (cudaRuntimeGetVersion(&found.runtime) != cudaSuccess) found.runtime = 0;
  return found;
}

void load(int device) {
  const Launcher on("load", Place{0, nullptr, device, nullptr});
  cudaFuncAttributes unused;
  for (const void* kernel : all_kernels()) on.check(cudaFuncGetAttributes(&unused, kernel));
}

std::size_t num_kernels() { return all_kernels().size(); }

bool is_capturing(void* stream) {
  // The default stream cannot be captured, and asking it while another is would be an error.
  if (stream == nullptr) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return error == cudaSuccess && status == cudaStreamCaptureStatusActive;
}

}  // namespace steppo::cuda
