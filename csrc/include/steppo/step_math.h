// The mathematics of one step and of one token (StepPO, arXiv 2604.18401), for any device.
//
// Per-step numbers are fp64 throughout: there are few of them, and a clip range of 3e-4 leaves
// little room for rounding. Comparisons are written so that a NaN reaches the loss. The family of
// surrogates is in surrogates.h.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "steppo/arguments.h"

namespace steppo {

// e^d = scale * (1 + r + tail) with scale a power of two. Keeping the parts apart gives e^d - 1 and
// e^d - 1 - d without cancellation around d = 0.
template <class T>
struct ExpParts {
  T scale, r, tail;
};

// The token functions below take a float, a double, or a vector of them (csrc/cpu/lanes.h): they
// are written without branches, and what vectors do in their own way goes through here.
template <class T>
struct Arithmetic;

// fp32, for |d| <= 88.
template <class T>
STEPPO_FN ExpParts<T> exp_parts_fp32(T d) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const T shifted = d * 1.44269504f + 12582912.0f;
  const T n = shifted - 12582912.0f;
  typename Arithmetic<T>::Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000u + 127u) << 23;
  ExpParts<T> parts;
  std::memcpy(&parts.scale, &bits, sizeof bits);
  // |r| <= ln(2) / 2, with ln(2) in two pieces.
  const T r = (d - n * 0.693359375f) + n * 2.12194440e-4f;
  parts.r = r;
  parts.tail =
      r * r *
      (0.5f +
       r * (1.6666667e-1f +
            r * (4.1666668e-2f + r * (8.3333338e-3f + r * (1.3888889e-3f + r * 1.984127e-4f)))));
  return parts;
}

// fp64: there to check fp32 against, so plain.
STEPPO_FN ExpParts<double> exp_parts_fp64(double d) {
  if (std::fabs(d) < 0.25) {
    double term = d * d / 2, sum = 0;
    for (int k = 3; k < 18; ++k) {
      sum += term;
      term *= d / k;
    }
    return {1.0, d, sum};
  }
  return {1.0, d, std::expm1(d) - d};
}

// A number in all places of a T.
template <class T>
STEPPO_FN T all_of(double number) {
  return T{} + static_cast<typename Arithmetic<T>::Number>(number);
}

// e^d in fp32: 0 below the smallest normal number, and no more than e^88.
template <class T>
STEPPO_FN T exp_fp32(T d);

template <>
struct Arithmetic<float> {
  using Number = float;
  using Bits = std::uint32_t;
  STEPPO_FN float select(bool mask, float yes, float no) { return mask ? yes : no; }
  STEPPO_FN ExpParts<float> exp_parts(float d) { return exp_parts_fp32(d); }
  STEPPO_FN float exp(float d) { return exp_fp32(d); }
};

template <>
struct Arithmetic<double> {
  using Number = double;
  STEPPO_FN double select(bool mask, double yes, double no) { return mask ? yes : no; }
  STEPPO_FN ExpParts<double> exp_parts(double d) { return exp_parts_fp64(d); }
  STEPPO_FN double exp(double d) { return std::exp(d); }
};

// A NaN passes: both comparisons are false for it.
template <class T>
STEPPO_FN T clamp(T x, float low, float high) {
  const T below = T{} + low, above = T{} + high;
  x = Arithmetic<T>::select(x < below, below, x);
  return Arithmetic<T>::select(x > above, above, x);
}

template <class T>
STEPPO_FN T exp_fp32(T d) {
  const ExpParts<T> e = exp_parts_fp32(clamp(d, -87.0f, 88.0f));
  return Arithmetic<T>::select(d < -87.0f, T{}, e.scale + e.scale * (e.r + e.tail));
}

// The smaller and the larger of two numbers; a NaN if one of them is.
STEPPO_FN double lesser(double a, double b) { return a < b || a != a ? a : b; }
STEPPO_FN double greater(double a, double b) { return a > b || a != a ? a : b; }

// The KL estimate of a token from d = log pi_ref - log pi, and its derivative by log pi.
// d is clamped to +-20 and the value to +-10; beyond, the derivative is 0. A NaN is not beyond.
template <class T>
struct KL {
  T value, slope;
};

template <KLEstimator kind, class T>
STEPPO_FN KL<T> kl_penalty(T d) {
  const T c = clamp(d, -20.0f, 20.0f);
  T value, slope;
  if constexpr (kind == kK1) {
    value = -c;
    slope = T{} + 1.0f;
  } else if constexpr (kind == kK2) {
    value = c * c * 0.5f;
    slope = -c;
  } else {
    const ExpParts<T> e = Arithmetic<T>::exp_parts(c);
    value = e.scale * e.tail + (e.scale * e.r - c) + (e.scale - 1.0f);
    slope = -(e.scale * e.tail + e.scale * e.r + (e.scale - 1.0f));
  }
  // A square is one comparison, which a NaN does not meet.
  const auto clamped = (d * d > 400.0f) | (value * value > 100.0f);
  return {clamp(value, -10.0f, 10.0f), Arithmetic<T>::select(clamped, T{}, slope)};
}

// L^-p of log rho = mu + L^-p sum(z - mu). A token's own ratio counts for one part in L.
STEPPO_FN double ratio_scale(Ratio ratio, double length) {
  return ratio == kProduct ? 1.0 : ratio == kCentered ? 1.0 / std::sqrt(length) : 1.0 / length;
}

// w_s of a reduction; `count` is the number of non-empty steps in the step's trajectory.
STEPPO_FN double step_weight(Reduction reduction, double length, double count) {
  return reduction == kTrajectoryMean ? 1.0 / count : (reduction == kTokenMean ? length : 1.0);
}

// The weight of a step: one that is given, or w_s of the reduction.
template <class T>
STEPPO_FN double weight_of(const T* step_weights, std::int64_t step, Reduction reduction,
                           double length, double count) {
  if (step_weights != nullptr) return static_cast<double>(step_weights[step]);
  return step_weight(reduction, length, count);
}

// What a reduction counts. `trajectories` may be a sum of 1 / count.
STEPPO_FN double reduction_count(Reduction reduction, double steps, double trajectories,
                                 double tokens) {
  return reduction == kStepMean         ? steps
         : reduction == kTrajectoryMean ? std::nearbyint(trajectories)
         : reduction == kTokenMean      ? tokens
                                        : 1.0;
}

// The denominator of a reduction: its count, at least 1.
STEPPO_FN double reduction_total(Reduction reduction, double steps, double trajectories,
                                 double tokens) {
  const double total = reduction_count(reduction, steps, trajectories, tokens);
  return total > 1.0 ? total : 1.0;
}

// Half the squared error of a value, clipped around the old value, and its derivative.
struct ValueLoss {
  double loss, slope;
  bool is_clipped;
};

STEPPO_FN ValueLoss value_step_loss(double value, double target, bool has_old, double old,
                                    double clip) {
  const double error = value - target;
  const double moved = value - old;
  // Within the range the clipped value is the value itself, to the last bit.
  if (has_old && !(moved <= clip && moved >= -clip)) {
    const double held = moved > clip ? clip : moved < -clip ? -clip : moved;
    const double clipped = old + held - target;
    if (clipped * clipped > error * error) return {0.5 * clipped * clipped, 0.0, true};
    // No number is larger than a NaN: it becomes both the loss and the derivative.
    if (clipped != clipped) return {clipped, clipped, false};
  }
  return {0.5 * error * error, error, false};
}

}  // namespace steppo
