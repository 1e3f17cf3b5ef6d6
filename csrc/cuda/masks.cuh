// Masks as kernels read them: bytes, of which those that are not 0 are the ones.
#pragma once

#include "device.cuh"

namespace steppo::cuda {

STEPPO_DEVICE bool is_set(const bool* mask, std::int64_t i) {
  return reinterpret_cast<const unsigned char*>(mask)[i] != 0;
}

}  // namespace steppo::cuda
