// The surrogates: what a unit with the log-ratio x and the advantage A gives, for any device. A
// unit is a step, or a token where ratio or advantage are its own.
//
// Every surrogate has the slope dl/dx = -A c with a weight c that depends on rho = e^x and on the
// sign of A. Its value is written next to it. Both are multiples of |A|.
#pragma once

#include "steppo/step_math.h"

namespace steppo {

// What comparisons of T give.
template <class T>
using MaskOf = decltype(T{} < T{});

template <class T>
struct Unit {
  T value;               // l(x, A)
  T slope;               // dl/dx; exactly 0 where A is
  MaskOf<T> is_clipped;  // the clipped branch is larger, or c is 0 or at a bound
};

// A unit as surrogates see it. T is a number or a vector of them.
template <class T>
struct Point {
  T log_ratio;  // x
  T ratio;      // e^min(x, log_ratio_max)
  T advantage;  // A
  T low, high;  // the bounds
  T gap;        // kTv alone: probability of the token now, less that under the old policy
};

// -A c is the value and the slope.
template <class T>
STEPPO_FN Unit<T> weighted(T advantage, T weight, MaskOf<T> is_clipped) {
  const T product = -advantage * weight;
  return {product, product, is_clipped};
}

// l = max(-A rho, -A clip(rho, 1 - low, 1 + high)), where A < 0 at most -d A with the dual clip d.
// A tie keeps its gradient.
template <class T>
STEPPO_FN Unit<T> clip_surrogate(const Point<T>& p, const PolicyConfig& c) {
  using Choose = Arithmetic<T>;
  const T low = 1.0f - p.low, high = 1.0f + p.high;
  T held = Choose::select(p.ratio < low, low, p.ratio);
  held = Choose::select(p.ratio > high, high, held);
  const T unclipped = -p.advantage * p.ratio, clipped = -p.advantage * held;
  const auto is_clipped = clipped > unclipped;
  T value = Choose::select(is_clipped, clipped, unclipped);
  T slope = Choose::select(is_clipped, T{}, unclipped);
  if (c.dual_clip > 0) {
    const T bound = -all_of<T>(c.dual_clip) * p.advantage;
    const auto is_bounded = (p.advantage < T{}) & (value > bound);
    value = Choose::select(is_bounded, bound, value);
    slope = Choose::select(is_bounded, T{}, slope);
  }
  return {value, slope, is_clipped};
}

// c = clip(rho, 1 - low, 1 + high), a constant.
template <class T>
STEPPO_FN Unit<T> cispo_surrogate(const Point<T>& p) {
  using Choose = Arithmetic<T>;
  const T low = 1.0f - p.low, high = 1.0f + p.high;
  T weight = Choose::select(p.ratio < low, low, p.ratio);
  weight = Choose::select(p.ratio > high, high, weight);
  return weighted(p.advantage, weight, (p.ratio <= low) | (p.ratio >= high));
}

// c = rho within the bounds, else 0.
template <class T>
STEPPO_FN Unit<T> mask_surrogate(const Point<T>& p) {
  const T low = 1.0f - p.low, high = 1.0f + p.high;
  const T weight = Arithmetic<T>::select((p.ratio < low) | (p.ratio > high), T{}, p.ratio);
  return weighted(p.advantage, weight, (p.ratio <= low) | (p.ratio >= high));
}

// l = -A (4 / t) sigmoid(t (rho - 1)), c = rho sech^2(t (rho - 1) / 2).
template <class T>
STEPPO_FN Unit<T> soft_surrogate(const Point<T>& p, const PolicyConfig& c) {
  using Choose = Arithmetic<T>;
  const T temperature =
      Choose::select(p.advantage < T{}, all_of<T>(c.soft_negative), all_of<T>(c.soft_positive));
  const T u = temperature * (p.ratio - 1.0f);
  // e^-|u| does not overflow, and both functions are made of it.
  const T e = Choose::exp(Choose::select(u > T{}, -u, u));
  const T inverse = 1.0f / (1.0f + e);
  const T sigmoid = Choose::select(u > T{}, inverse, e * inverse);
  const T weight = p.ratio * (4.0f * e * inverse * inverse);
  return {-p.advantage * (4.0f / temperature) * sigmoid, -p.advantage * weight, weight == T{}};
}

// l = -A rho + |A| (rho - 1)^2 / (2 eps), eps the bound on the side of A.
template <class T>
STEPPO_FN Unit<T> quadratic_surrogate(const Point<T>& p) {
  using Choose = Arithmetic<T>;
  const auto is_negative = p.advantage < T{};
  const T bound = Choose::select(is_negative, p.low, p.high);
  const T away = Choose::select(is_negative, 1.0f - p.ratio, p.ratio - 1.0f);
  const T size = Choose::select(is_negative, -p.advantage, p.advantage);
  const T weight = p.ratio * (1.0f - away / bound);
  const T value = -p.advantage * p.ratio + size * away * away / (2.0f * bound);
  return {value, -p.advantage * weight, weight == T{}};
}

// c = rho while the probability has not moved by more than the bound on the side of A, a constant.
template <class T>
STEPPO_FN Unit<T> tv_surrogate(const Point<T>& p, const PolicyConfig& c) {
  using Choose = Arithmetic<T>;
  // Chosen first and compared once: a number that is not there is beyond no bound.
  const auto is_negative = p.advantage < T{};
  const T moved = Choose::select(is_negative, -p.gap, p.gap);
  const auto is_beyond = moved > Choose::select(is_negative, p.low, p.high);
  const T weight = Choose::select(is_beyond, T{}, p.ratio);
  return weighted(p.advantage, weight,
                  (weight == T{}) | (p.log_ratio >= all_of<T>(c.log_ratio_max)));
}

template <Surrogate kind, class T>
STEPPO_FN Unit<T> surrogate(const Point<T>& p, const PolicyConfig& c) {
  Unit<T> unit;
  if constexpr (kind == kClip) {
    unit = clip_surrogate(p, c);
  } else if constexpr (kind == kCispo) {
    unit = cispo_surrogate(p);
  } else if constexpr (kind == kMask) {
    unit = mask_surrogate(p);
  } else if constexpr (kind == kSoft) {
    unit = soft_surrogate(p, c);
  } else if constexpr (kind == kQuadratic) {
    unit = quadratic_surrogate(p);
  } else {
    unit = tv_surrogate(p, c);
  }
  auto is_flat = p.advantage == T{};
  // Above its largest value x is a constant. Weights that are constants have their slope all the
  // same.
  if constexpr (kind != kCispo && kind != kTv) is_flat |= p.log_ratio > all_of<T>(c.log_ratio_max);
  unit.slope = Arithmetic<T>::select(is_flat, T{}, unit.slope);
  return unit;
}

// Calls body(kind) with the surrogate as a constant of its type.
template <Surrogate kind>
struct SurrogateConstant {
  static constexpr Surrogate value = kind;
};

template <class F>
STEPPO_FN auto with_surrogate(Surrogate kind, F&& body) {
  switch (kind) {
    case kCispo:
      return body(SurrogateConstant<kCispo>{});
    case kMask:
      return body(SurrogateConstant<kMask>{});
    case kSoft:
      return body(SurrogateConstant<kSoft>{});
    case kQuadratic:
      return body(SurrogateConstant<kQuadratic>{});
    case kTv:
      return body(SurrogateConstant<kTv>{});
    default:
      return body(SurrogateConstant<kClip>{});
  }
}

// The unit of a step, by the surrogate that is configured.
STEPPO_FN Unit<double> step_unit(const Point<double>& point, const PolicyConfig& c) {
  return with_surrogate(c.surrogate,
                        [&](auto kind) { return surrogate<decltype(kind)::value>(point, c); });
}

// e^min(x, log_ratio_max).
template <class T>
STEPPO_FN T ratio_of(T log_ratio, double log_ratio_max) {
  const T most = all_of<T>(log_ratio_max);
  return Arithmetic<T>::exp(Arithmetic<T>::select(log_ratio > most, most, log_ratio));
}

}  // namespace steppo
