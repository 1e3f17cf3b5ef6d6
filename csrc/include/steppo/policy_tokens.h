// What the policy part of the loss gives to a token that differs from others of its step, for any
// device. T is a number or a vector of them.
#pragma once

#include "steppo/surrogates.h"

namespace steppo {

// The slope and the value of a token, 1 where it is clipped, below and above a ratio of 1, and its
// ratio.
template <class T>
struct TokenUnit {
  T slope, value, clipped_low, clipped_high, ratio;
};

// Whether token log-ratios are clamped before they are pooled.
STEPPO_FN bool clips_tokens(const PolicyConfig& config) {
  return !(std::isinf(config.token_clip_low) && std::isinf(config.token_clip_high));
}

// z, clamped on the side of the advantage.
template <class T>
STEPPO_FN T held_log_ratio(T z, T advantage, const PolicyConfig& config) {
  using Choose = Arithmetic<T>;
  const T low = -all_of<T>(config.token_clip_low), high = all_of<T>(config.token_clip_high);
  return Choose::select(advantage < T{}, Choose::select(z < low, low, z),
                        Choose::select(z > high, high, z));
}

// A step as its tokens see it that have advantages of their own, or are clamped. Value and slope
// are multiples of |A|, so that a step decides both signs once, in fp64.
struct SignedUnits {
  double ratio;
  Unit<double> positive, negative;
};

STEPPO_FN SignedUnits signed_units(Point<double> point, const PolicyConfig& config) {
  SignedUnits units;
  units.ratio = point.ratio;
  point.advantage = 1.0;
  units.positive = step_unit(point, config);
  point.advantage = -1.0;
  units.negative = step_unit(point, config);
  return units;
}

// A token with the advantage a under the ratio of its step. `z` is its log-ratio, and is read if
// `is_held_too`: then tokens are clamped.
template <class T>
STEPPO_FN TokenUnit<T> token_of_step(T a, T z, bool is_held_too, const SignedUnits& step,
                                     const PolicyConfig& config) {
  using Choose = Arithmetic<T>;
  const auto is_negative = a < T{}, is_zero = a == T{};
  const T size = Choose::select(is_negative, -a, a);
  const auto signed_part = [&](double of_positive, double of_negative) {
    return Choose::select(is_negative, all_of<T>(of_negative), all_of<T>(of_positive));
  };
  T slope = signed_part(step.positive.slope, step.negative.slope);
  slope = Choose::select(is_zero | (slope == T{}), T{}, size * slope);
  if (is_held_too) {
    const auto is_held = held_log_ratio(z, a, config) != z;
    // What is not there was not clamped.
    slope = Choose::select(is_held & (z == z), T{}, slope);
  }
  // Without an advantage nothing tells the branches of a clip apart.
  const double zero_is_clipped = config.surrogate != kClip && step.positive.is_clipped;
  T clipped = signed_part(step.positive.is_clipped, step.negative.is_clipped);
  clipped = Choose::select(is_zero, all_of<T>(zero_is_clipped), clipped);
  clipped = Choose::select(a == a, clipped, T{});
  const bool is_low = step.ratio < 1;
  return {slope, size * signed_part(step.positive.value, step.negative.value),
          is_low ? clipped : T{}, is_low ? T{} : clipped, T{}};
}

// A token with a ratio of its own.
template <Surrogate kind, class T>
STEPPO_FN TokenUnit<T> token_by_itself(T now, T old, T advantage, T low, T high,
                                       const PolicyConfig& config) {
  using Choose = Arithmetic<T>;
  const T z = now - old;
  Point<T> point{z, ratio_of(z, config.log_ratio_max), advantage, low, high, T{}};
  if constexpr (kind == kTv) point.gap = Choose::exp(now) - Choose::exp(old);
  const Unit<T> unit = surrogate<kind>(point, config);
  const T clipped = Choose::select(unit.is_clipped, all_of<T>(1.0), T{});
  const auto is_low = point.ratio < all_of<T>(1.0);
  return {unit.slope, unit.value, Choose::select(is_low, clipped, T{}),
          Choose::select(is_low, T{}, clipped), point.ratio};
}

// The KL penalty by the estimator that is configured.
template <class T>
STEPPO_FN KL<T> penalty_of(KLEstimator kind, T d) {
  return kind == kK1 ? kl_penalty<kK1>(d) : kind == kK2 ? kl_penalty<kK2>(d) : kl_penalty<kK3>(d);
}

}  // namespace steppo
