// What a thread makes of logits of a row: sums of its softmax, and its slope.
#pragma once

#include "rows.cuh"

namespace steppo::cuda {

// What a thread has seen of a row: RowSums in the type of the computation.
template <class Value>
struct Sums {
  Value top, sum, moment;
};

// The first top is a number, so that differences to it are. That of the row is at least the target,
// as one of its threads begins there.
template <class Value>
STEPPO_DEVICE Sums<Value> first_sums(bool at_target, Value target) {
  constexpr Value kLowest = std::numeric_limits<Value>::lowest();
  return {at_target && target > kLowest ? target : kLowest, 0, 0};
}

// Moves sums to a larger top. What they were around may be the lowest number.
template <bool need_moment, class Value>
STEPPO_DEVICE void move_to(Value top, const ExpScale<Value>& scale, Sums<Value>& sums) {
  const Value d = larger(sums.top - top, scale.lowest), e = power(d * scale.scale);
  if constexpr (need_moment) sums.moment = e * (sums.moment + d * sums.sum);
  sums.sum *= e;
  sums.top = top;
}

// Adds numbers to sums, which move at most once.
template <bool need_moment, int count, class Value>
STEPPO_DEVICE void add(const Value (&x)[count], const ExpScale<Value>& scale, Sums<Value>& sums) {
  Value high = x[0];
#pragma unroll
  for (int k = 1; k < count; ++k) high = x[k] > high ? x[k] : high;
  if (high > sums.top) move_to<need_moment>(high, scale, sums);
#pragma unroll
  for (int k = 0; k < count; ++k) {
    Value d = x[k] - sums.top;
    // The product of an infinite d and the 0 that is its power would be NaN.
    if constexpr (need_moment) d = larger(d, scale.lowest);
    const Value e = power(d * scale.scale);
    sums.sum += e;
    if constexpr (need_moment) sums.moment += e * d;
  }
}

// The gradient of a logit by itself and the top of its row: RowGradient in the type of the
// computation, with a rise by the exponent of a power.
template <bool is_capped, bool has_rise, class Value>
struct Slope {
  ExpScale<Value> scale;
  Value top, base, rise;

  __device__ __forceinline__ Slope(double temperature, double row_top, const RowGradient& row)
      : scale(exp_scale<Value>(temperature)),
        top(static_cast<Value>(row_top)),
        base(static_cast<Value>(row.base)),
        rise(static_cast<Value>(row.rise * log_of_power_base(Value{}))) {}

  // Whether words of probability 0 have a gradient of 0, as the other factor is finite.
  __device__ __forceinline__ bool is_finite() const {
    const Value most = 128 * rise;
    return base - base == 0 && most - most == 0;
  }

  template <class In>
  __device__ __forceinline__ Value operator()(In x, const Cap<RowValue<In>>& cap) const {
    const Capped<RowValue<In>> z = capped_logit<is_capped>(x, cap);
    Value d = static_cast<Value>(z.value) - top;
    if constexpr (has_rise) d = larger(d, scale.lowest);
    const Value exponent = d * scale.scale;
    Value slope = power(exponent) * (has_rise ? exponent * rise + base : base);
    if constexpr (is_capped) slope *= static_cast<Value>(z.slope);
    return slope;
  }
};

}  // namespace steppo::cuda
