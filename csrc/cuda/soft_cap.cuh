// The softcap of logits, cap * tanh(x / cap).
#pragma once

#include "packs.cuh"
#include "steppo/token_math.h"

namespace steppo::cuda {

// A softcap in the type of the computation.
template <class Value>
struct Cap {
  Value cap, inverse;
  __device__ __forceinline__ explicit Cap(double softcap)
      : cap(static_cast<Value>(softcap)), inverse(static_cast<Value>(1 / softcap)) {}
};

// cap * tanh(x / cap), and its derivative, by the instructions for powers and reciprocals. The
// value is off by some units of the last place.
STEPPO_DEVICE Capped<float> fast_soft_cap(float x, const Cap<float>& cap) {
  const float u = fabsf(x) * cap.inverse, square = u * u;
  // tanh(u) = u + u square P(square) up to 0.9, to 2e-8.
  const float near_0 =
      u + u * square *
              (-0.333331978f +
               square * (0.133300791f +
                         square * (-0.0537038657f +
                                   square * (0.0208563782f + square * (-0.00680185469f +
                                                                       square * 0.00127776422f)))));
  // Above, what is left to 1 is 2 / (e^2u + 1).
  const float left = 2.0f * fast_reciprocal(1.0f + fast_exp2(u * 2.88539008f));
  const bool is_near_0 = u < 0.9f;
  const float size = is_near_0 ? near_0 : 1.0f - left;
  const float rest = is_near_0 ? 1.0f - near_0 : left;
  return {copysignf(cap.cap * size, x), rest * (2.0f - rest)};
}

// One capped logit, and the derivative of the cap.
template <bool is_capped, class In>
STEPPO_DEVICE Capped<RowValue<In>> capped_logit(In x, const Cap<RowValue<In>>& cap) {
  if constexpr (!is_capped) {
    return {to_number(x), 1};
  } else if constexpr (sizeof(In) == sizeof(double)) {
    return soft_cap(x, cap.cap, cap.inverse);
  } else {
    return fast_soft_cap(to_number(x), cap);
  }
}

// The capped numbers of a pack.
template <bool is_capped, class In, int count>
STEPPO_DEVICE void unpack_capped(const Pack<In, count>& pack, const Cap<RowValue<In>>& cap,
                                 RowValue<In> (&x)[count]) {
  unpack(pack, x);
#pragma unroll
  for (int k = 0; k < count; ++k) x[k] = capped_logit<is_capped>(x[k], cap).value;
}

}  // namespace steppo::cuda
