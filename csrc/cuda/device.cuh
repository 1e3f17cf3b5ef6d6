// What kernels are written with. The only file that knows whether it is compiled for a GPU or, by
// tests, for the host (tests/cuda/cuda_on_host.h).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(STEPPO_CUDA_ON_HOST)
#include "cuda_on_host.h"
#define STEPPO_DEVICE static inline
#define STEPPO_MEMBER inline
#define STEPPO_SHARED(type, name) auto& name = cuda_on_host::shared<type>([] {})
#else
#define STEPPO_DEVICE __device__ __forceinline__ static
#define STEPPO_MEMBER __device__ __forceinline__
#define STEPPO_SHARED(type, name) \
  using name##_type = type;       \
  __shared__ name##_type name
#endif

namespace steppo::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Numbers that are moved together.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
  T at[count];
};

// Stores a pack of 16 bytes at once. A compiler may take the store of a pack apart; this one it
// leaves whole.
template <class T, int count>
STEPPO_DEVICE void store_16_bytes(T* to, const Pack<T, count>& pack) {
  static_assert(sizeof pack == sizeof(uint4), "a pack of 16 bytes");
  uint4 words;
  std::memcpy(&words, &pack, sizeof words);
  __stcg(reinterpret_cast<uint4*>(to), words);
}

// The sum over `lanes` neighbouring lanes, a power of 2; each of them gets it. The order of the
// additions is fixed.
template <int lanes>
STEPPO_DEVICE double sum_of_lanes(double value) {
#pragma unroll
  for (int apart = lanes / 2; apart > 0; apart /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, apart, lanes);
  }
  return value;
}

}  // namespace steppo::cuda
