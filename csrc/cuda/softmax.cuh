// What a thread makes of logits of a row: sums of its softmax, and its slope.
#pragma once

#include <limits>

#include "packs.cuh"
#include "soft_cap.cuh"

namespace steppo::cuda {

STEPPO_DEVICE double larger(double x, double low) { return x < low ? low : x; }

// What exp_scale makes exponents for.
STEPPO_DEVICE float power(float exponent) { return fast_exp2(exponent); }
STEPPO_DEVICE double power(double exponent) { return std::exp(exponent); }

STEPPO_DEVICE double log_of_power_base(float) { return 0.6931471805599453; }
STEPPO_DEVICE double log_of_power_base(double) { return 1; }

// Whether rows of this type of logits can be computed in their own type at a temperature.
template <class In>
STEPPO_DEVICE bool fits(double temperature) {
  return sizeof(In) == sizeof(double) || fits_fp32(temperature);
}

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

STEPPO_DEVICE float larger_number(float a, float b) { return fmaxf(a, b); }
STEPPO_DEVICE double larger_number(double a, double b) { return a > b ? a : b; }

// The largest of some numbers. Of a NaN among them nothing is asked: the sum becomes one.
template <class Value, int count>
STEPPO_DEVICE Value largest(const Value (&x)[count]) {
  Value high = x[0];
#pragma unroll
  for (int k = 1; k < count; ++k) high = larger_number(x[k], high);
  return high;
}

// The same of packs. Those of halves are compared two by two.
template <class In, int count>
STEPPO_DEVICE RowValue<In> largest(const Pack<In, kPack<In>> (&packs)[count]) {
  if constexpr (sizeof(In) == 2) {
    std::uint32_t words[4 * count];
    memcpy(words, packs, sizeof words);
    Pack<In, 2> high;
#pragma unroll
    for (int k = 1; k < 4 * count; ++k) words[0] = larger_halves(In{}, words[0], words[k]);
    memcpy(&high, words, sizeof high);
    RowValue<In> x[2];
    unpack(high, x);
    return largest(x);
  } else {
    RowValue<In> high = packs[0].at[0];
#pragma unroll
    for (int k = 0; k < count; ++k) high = larger_number(largest(packs[k].at), high);
    return high;
  }
}

// Adds numbers that are no larger than the top.
template <bool need_moment, int count, class Value>
STEPPO_DEVICE void add_below(const Value (&x)[count], const ExpScale<Value>& scale,
                             Sums<Value>& sums) {
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

// Adds numbers to sums, which move at most once.
template <bool need_moment, int count, class Value>
STEPPO_DEVICE void add(const Value (&x)[count], const ExpScale<Value>& scale, Sums<Value>& sums) {
  const Value high = largest(x);
  if (high > sums.top) move_to<need_moment>(high, scale, sums);
  add_below<need_moment>(x, scale, sums);
}

// The same with packs of them.
template <bool need_moment, int count, class In>
STEPPO_DEVICE void add(Pack<In, kPack<In>> (&packs)[count], const ExpScale<RowValue<In>>& scale,
                       Sums<RowValue<In>>& sums) {
  const RowValue<In> high = largest(packs);
  if (high > sums.top) move_to<need_moment>(high, scale, sums);
#pragma unroll
  for (int p = 0; p < count; ++p) {
    RowValue<In> x[kPack<In>];
    keep_packed(packs[p]);
    unpack(packs[p], x);
    add_below<need_moment>(x, scale, sums);
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

  template <class Logit>
  __device__ __forceinline__ Value operator()(Logit x, const Cap<Logit>& cap) const {
    const Capped<Logit> z = capped_logit<is_capped>(x, cap);
    Value d = static_cast<Value>(z.value) - top;
    if constexpr (has_rise) d = larger(d, scale.lowest);
    const Value exponent = d * scale.scale;
    Value slope = power(exponent) * (has_rise ? exponent * rise + base : base);
    if constexpr (is_capped) slope *= static_cast<Value>(z.slope);
    return slope;
  }
};

}  // namespace steppo::cuda
