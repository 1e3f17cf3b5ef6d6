// What the value loss adds up over steps that are not empty, and the metrics made of it, for any
// device.
#pragma once

#include "steppo/step_math.h"

namespace steppo {

// What the denominator is made of.
struct ValueCounts {
  double steps, trajectories, tokens;
};

STEPPO_FN void add_step(ValueCounts& counts, std::int32_t length, std::int32_t trajectory_count) {
  counts.steps += 1;
  counts.trajectories += 1.0 / trajectory_count;
  counts.tokens += length;
}

STEPPO_FN void merge(ValueCounts& all, const ValueCounts& other) {
  all.steps += other.steps;
  all.trajectories += other.trajectories;
  all.tokens += other.tokens;
}

struct ValueSums {
  double loss, clipped, value, target;
};

STEPPO_FN void add_step(ValueSums& sums, const ValueLoss& step, double weight, double value,
                        double target) {
  sums.loss += weight * step.loss;
  sums.clipped += step.is_clipped;
  sums.value += value;
  sums.target += target;
}

STEPPO_FN void merge(ValueSums& all, const ValueSums& other) {
  all.loss += other.loss;
  all.clipped += other.clipped;
  all.value += other.value;
  all.target += other.target;
}

// What the loss is divided by; a `normalizer` that is given replaces that of the reduction.
STEPPO_FN double value_total(Reduction reduction, const ValueCounts& counts,
                             const Number& normalizer) {
  if (normalizer.is_given) return value_of(normalizer);
  return reduction_total(reduction, counts.steps, counts.trajectories, counts.tokens);
}

// A mean over no steps is 0.
STEPPO_FN double value_mean(double sum, const ValueCounts& counts) {
  return sum / (counts.steps > 0 ? counts.steps : 1);
}

// Means of the returns, and of the residuals: what the values leave of the returns.
struct ValueMeans {
  double target, residual;
};

STEPPO_FN ValueMeans value_means(const ValueCounts& counts, const ValueSums& sums) {
  return {value_mean(sums.target, counts), value_mean(sums.target - sums.value, counts)};
}

// Squared deviations of the same from their means.
struct ValueSquares {
  double target, residual;
};

STEPPO_FN void add_step(ValueSquares& squares, const ValueMeans& means, double value,
                        double target) {
  const double residual = target - value;
  squares.target += (target - means.target) * (target - means.target);
  squares.residual += (residual - means.residual) * (residual - means.residual);
}

STEPPO_FN void merge(ValueSquares& all, const ValueSquares& other) {
  all.target += other.target;
  all.residual += other.residual;
}

// The squares of a part of the steps, from its own means, as deviations from those of all steps.
STEPPO_FN ValueSquares squares_from(const ValueMeans& all, const ValueSquares& squares,
                                    const ValueMeans& own, double steps) {
  // Nothing has no mean.
  if (steps == 0) return squares;
  const double target = own.target - all.target, residual = own.residual - all.residual;
  return {squares.target + steps * target * target, squares.residual + steps * residual * residual};
}

STEPPO_FN void write_value_metrics(Reduction reduction, const ValueCounts& counts,
                                   const ValueSums& sums, const ValueSquares& squares,
                                   const Number& normalizer, double* metrics) {
  metrics[kValueLoss] = sums.loss / value_total(reduction, counts, normalizer);
  metrics[kValueClipFraction] = value_mean(sums.clipped, counts);
  metrics[kValueMean] = value_mean(sums.value, counts);
  metrics[kReturnMean] = value_mean(sums.target, counts);
  metrics[kExplainedVariance] = squares.target == 0 ? 0.0 : 1 - squares.residual / squares.target;
  metrics[kValueNumSteps] = counts.steps;
  metrics[kValueDenominator] =
      normalizer.is_given
          ? value_of(normalizer)
          : reduction_count(reduction, counts.steps, counts.trajectories, counts.tokens);
  metrics[kReturnSquares] = squares.target;
  metrics[kResidualSquares] = squares.residual;
}

}  // namespace steppo
