// Fills memory with zeros.
#pragma once

#include "launch.h"

namespace steppo::cuda {

constexpr int kFillThreads = 256;

// A thread writes 16 bytes; what is left over at the end is written one by one. Without `is_wide`,
// all is: the address may be any.
template <class T, bool is_wide>
__global__ void __launch_bounds__(kFillThreads, 4) fill_kernel(T* data, std::int64_t count) {
  constexpr int kNumbers = 16 / sizeof(T);
  const std::int64_t first = (std::int64_t{blockIdx.x} * kFillThreads + threadIdx.x) * kNumbers;
  if (is_wide && first + kNumbers <= count) {
    *reinterpret_cast<Pack<T, kNumbers>*>(data + first) = {};
    return;
  }
  for (std::int64_t i = first; i < first + kNumbers && i < count; ++i) data[i] = T(0);
}

template <class T>
void fill_with_zeros(const Launcher& launch, T* data, std::int64_t count) {
  constexpr int kNumbers = 16 / sizeof(T);
  launch(is_wide(data) ? listed<fill_kernel<T, true>>() : listed<fill_kernel<T, false>>(),
         ceil_div(count, kFillThreads * kNumbers), kFillThreads, data, count);
}

}  // namespace steppo::cuda
