// The half precisions, and the types that logits may have, for any device.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "steppo/types.h"

namespace steppo {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// fp16, in the low half of a word, to fp32 and back (to nearest, ties to even), without branches.
template <class T, class Bits>
STEPPO_FN T half_to_float(Bits half) {
  const Bits size = (half & 0x7FFFu) << 13;
  T value;
  std::memcpy(&value, &size, sizeof value);
  value *= 5.192296858534828e33f;  // 2^112 moves the exponent to its place.
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  const Bits is_special = (size + 0x00800000u) >> 28;  // inf or NaN
  bits = bits | ((0u - is_special) & 0x7F800000u) | ((half & 0x8000u) << 16);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Bits, class T>
STEPPO_FN Bits half_bits(T x) {
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Bits size = bits & 0x7FFFFFFFu;
  // All ones where the left number is less than the right one.
  const auto less = [](Bits left, Bits right) { return 0u - ((left - right) >> 31); };
  const Bits normal = (size - 0x38000000u + 0xFFFu + ((size >> 13) & 1u)) >> 13;
  T above;
  std::memcpy(&above, &size, sizeof above);
  above += 0.5f;  // Its last bit is that of a subnormal.
  Bits small;
  std::memcpy(&small, &above, sizeof small);
  small = small - 0x3F000000u;
  const Bits is_small = less(size, Bits{} + 0x38800000u);
  const Bits is_inf = less(Bits{} + 0x477FEFFFu, size), is_nan = less(Bits{} + 0x7F800000u, size);
  Bits half = (small & is_small) | (normal & ~is_small);
  half = (half & ~is_inf) | (0x7C00u & is_inf) | (0x0200u & is_nan);
  return half | ((bits >> 16) & 0x8000u);
}

// To the upper half of a word, to nearest. Its lower half is arbitrary, and of a NaN the upper half
// may only be that of a bf16.
template <class Bits, class T>
STEPPO_FN Bits bfloat_bits(T x) {
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits + 0x8000u;
}

// Calls body(In{}) with the type of logits that `dtype` names.
template <class F>
static inline void with_logits(int dtype, F&& body) {
  if (dtype == kFloat16) {
    body(Half{});
  } else if (dtype == kBFloat16) {
    body(BFloat16{});
  } else if (dtype == kFloat64) {
    body(double{});
  } else {
    body(float{});
  }
}

// Calls body(In{}, Out{}) with the types of logits and of their gradient: the same, or of fp32
// logits a half precision. Others are thrown: what is written would not be what there is room for.
template <class F>
static inline void with_gradient(int dtype, int grad_dtype, F&& body) {
  with_logits(dtype, [&](auto in) {
    if constexpr (sizeof in == sizeof(float)) {
      if (grad_dtype == kFloat16) return body(in, Half{});
      if (grad_dtype == kBFloat16) return body(in, BFloat16{});
    }
    if (grad_dtype != dtype) {
      throw std::invalid_argument("a gradient has a dtype that its numbers are not written in");
    }
    body(in, in);
  });
}

// Calls body(In{}, Out{}) with the types of rows and of a sum of them: the same, or of a half
// precision fp32.
template <class F>
static inline void with_sum(int dtype, int sum_dtype, F&& body) {
  with_logits(dtype, [&](auto in) {
    if constexpr (sizeof in < sizeof(float)) {
      if (sum_dtype == kFloat32) return body(in, float{});
    }
    if (sum_dtype != dtype) {
      throw std::invalid_argument("a sum has a dtype that its numbers are not written in");
    }
    body(in, in);
  });
}

}  // namespace steppo
