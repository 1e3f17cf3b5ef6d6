// Numbers side by side that are moved 16 bytes at once: logits, rows of the head, gradients.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "launch.h"

namespace steppo::cuda {

// What numbers of a type are computed in.
template <class In>
using RowValue = std::conditional_t<sizeof(In) == sizeof(double), double, float>;

template <class In>
constexpr int kPack = 16 / static_cast<int>(sizeof(In));

// Loads of 16 bytes that a thread has under way at once. 64 bytes a thread hide how long a load
// takes; fp64 has no registers for them.
template <class In>
constexpr int kLoads = sizeof(In) == sizeof(double) ? 1 : 4;

STEPPO_DEVICE float to_number(float x) { return x; }
STEPPO_DEVICE double to_number(double x) { return x; }

// Numbers side by side in the type of a gradient.
template <class Out, class Value, int count>
STEPPO_DEVICE Pack<Out, count> packed(const Value (&x)[count]) {
  Pack<Out, count> pack;
  if constexpr (sizeof(Out) == 2) {
#pragma unroll
    for (int k = 0; k < count; k += 2) {
      const std::uint32_t both =
          two_numbers(Out{}, static_cast<float>(x[k]), static_cast<float>(x[k + 1]));
      memcpy(&pack.at[k], &both, sizeof both);
    }
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k) pack.at[k] = static_cast<Out>(x[k]);
  }
  return pack;
}
template <class Out, class Value>
STEPPO_DEVICE void store_number(Out* to, Value x) {
  const Value both[2] = {x, x};
  *to = packed<Out>(both).at[0];
}

// The numbers of a pack. A bf16 is the upper half of an fp32, so that words hold two of them.
template <class In, int count>
STEPPO_DEVICE void unpack(const Pack<In, count>& pack, RowValue<In> (&x)[count]) {
#pragma unroll
  for (int k = 0; k < count; ++k) x[k] = to_number(pack.at[k]);
}
template <int count>
STEPPO_DEVICE void unpack(const Pack<BFloat16, count>& pack, float (&x)[count]) {
  if constexpr (count % 2 == 0) {
#pragma unroll
    for (int k = 0; k < count; k += 2) {
      std::uint32_t both;
      memcpy(&both, &pack.at[k], sizeof both);
      const std::uint32_t words[2] = {both << 16, both & 0xFFFF0000u};
      memcpy(&x[k], words, sizeof words);
    }
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k) x[k] = to_number(pack.at[k]);
  }
}

// Whether all rows at an address, which are so far apart, are made of packs.
template <class T>
bool are_wide(const void* rows, std::int64_t stride, std::int64_t size) {
  return is_wide(rows) && stride % kPack<T> == 0 && size % kPack<T> == 0 && size > 0;
}

// Loads numbers one by one, or 16 bytes at once.
template <int count, bool is_wide, class In>
STEPPO_DEVICE Pack<In, count> load_numbers(const In* from) {
  constexpr int kAtOnce = kPack<In>;
  static_assert(count % kAtOnce == 0, "numbers are loaded 16 bytes at once");
  Pack<In, count> numbers;
  if constexpr (is_wide) {
#pragma unroll
    for (int part = 0; part < count; part += kAtOnce) {
      const auto pack = load_once(reinterpret_cast<const Pack<In, kAtOnce>*>(from + part));
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) numbers.at[part + k] = pack.at[k];
    }
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k) numbers.at[k] = from[k];
  }
  return numbers;
}

}  // namespace steppo::cuda
