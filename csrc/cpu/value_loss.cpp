// The clipped value loss on steps: see steppo_kernels/losses/value_loss.py.
#include <cmath>

#include "kernel.h"
#include "steppo/step_math.h"

namespace steppo::cpu::STEPPO_ISA {
namespace {

// What the denominator is made of.
struct Counts {
  double steps = 0, trajectories = 0, tokens = 0;

  void add(const Counts& other) {
    steps += other.steps;
    trajectories += other.trajectories;
    tokens += other.tokens;
  }
};

struct Sums {
  double loss = 0, clipped = 0, value = 0, target = 0;

  void add(const Sums& other) {
    loss += other.loss;
    clipped += other.clipped;
    value += other.value;
    target += other.target;
  }
};

// Squared deviations from the means: of the returns, and of what the values leave of them.
struct Spread {
  double target = 0, residual = 0;

  void add(const Spread& other) {
    target += other.target;
    residual += other.residual;
  }
};

// Asks for what a later step reads: values lie wherever steps begin.
constexpr int64_t kStepsAhead = 16;

template <class T>
STEPPO_FN void fetch(const T* values, const T* old, const int64_t* state_index, int64_t step) {
  __builtin_prefetch(values + state_index[step]);
  if (old != nullptr) __builtin_prefetch(old + state_index[step]);
}

// Adds up what body(s, sums) adds to `sums` for the steps s that are not empty.
template <class S, class F>
S sum_steps(const int32_t* step_lengths, int64_t num_steps, int threads, F&& body) {
  constexpr int64_t kSteps = 2048;
  Buffer<S> partial(ceil_div(num_steps, kSteps));
  parallel_blocks(num_steps, kSteps, threads, [&](int64_t b, int64_t begin, int64_t end) {
    S sums;
    for (int64_t s = begin; s < end; ++s) {
      if (step_lengths[s] != 0) body(s, sums);
    }
    partial[b] = sums;
  });
  S total;
  for (int64_t b = 0; b < ceil_div(num_steps, kSteps); ++b) total.add(partial[b]);
  return total;
}

}  // namespace

void value_loss(const ValueTensors& tensors, const States& states, const ValueConfig& config,
                const Place& place) {
  // A value that no step takes costs a zero.
  const int64_t num_steps = states.num_steps;
  const int threads = worthwhile_threads(tensors.num_values / 4 + num_steps, place.threads);
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* v = static_cast<const T*>(tensors.values);
    const T* target = static_cast<const T*>(tensors.returns);
    const T* old = static_cast<const T*>(tensors.old_values);
    T* grad = static_cast<T*>(tensors.grad_values);
    const Reduction kind = config.reduction;
    double* const metrics = tensors.metrics;
    if (grad != nullptr) {
      parallel_blocks(tensors.num_values, kBlock, threads,
                      [&](int64_t, int64_t begin, int64_t end) { fill(grad, begin, end, zero); });
    }
    const auto counts =
        sum_steps<Counts>(states.step_lengths, num_steps, threads, [&](int64_t s, auto& sum) {
          sum.steps += 1;
          sum.tokens += states.step_lengths[s];
          sum.trajectories += 1.0 / states.trajectory_counts[s];
        });
    const double total =
        tensors.normalizer != nullptr
            ? *tensors.normalizer
            : reduction_total(kind, counts.steps, counts.trajectories, counts.tokens);
    const auto at = [&](bool per_token, int64_t s) {
      return per_token ? states.state_index[s] : s;
    };
    const auto sums =
        sum_steps<Sums>(states.step_lengths, num_steps, threads, [&](int64_t s, auto& sum) {
          if (tensors.values_per_token && s + kStepsAhead < num_steps) {
            fetch(v, tensors.old_values_per_token ? old : nullptr, states.state_index,
                  s + kStepsAhead);
          }
          const double value = v[at(tensors.values_per_token, s)];
          const double before = old == nullptr ? 0.0 : old[at(tensors.old_values_per_token, s)];
          const ValueLoss step =
              value_step_loss(value, target[s], old != nullptr, before, config.clip);
          const double weight =
              step_weight(kind, states.step_lengths[s], states.trajectory_counts[s]);
          sum.loss += weight * step.loss;
          sum.clipped += step.is_clipped;
          sum.value += value;
          sum.target += target[s];
          if (grad != nullptr) {
            grad[at(tensors.values_per_token, s)] = static_cast<T>(weight / total * step.slope);
          }
        });
    const double steps = counts.steps > 0 ? counts.steps : 1;
    const double target_mean = sums.target / steps;
    const double residual_mean = (sums.target - sums.value) / steps;
    const auto spread =
        sum_steps<Spread>(states.step_lengths, num_steps, threads, [&](int64_t s, auto& sum) {
          const double residual =
              target[s] - static_cast<double>(v[at(tensors.values_per_token, s)]);
          sum.target += (target[s] - target_mean) * (target[s] - target_mean);
          sum.residual += (residual - residual_mean) * (residual - residual_mean);
        });
    *static_cast<T*>(tensors.loss) = static_cast<T>(sums.loss / total);
    metrics[kValueLoss] = sums.loss / total;
    metrics[kValueClipFraction] = sums.clipped / steps;
    metrics[kValueMean] = sums.value / steps;
    metrics[kReturnMean] = target_mean;
    metrics[kExplainedVariance] = spread.target == 0 ? 0.0 : 1 - spread.residual / spread.target;
    metrics[kValueNumSteps] = counts.steps;
    metrics[kValueDenominator] =
        tensors.normalizer != nullptr
            ? *tensors.normalizer
            : reduction_count(kind, counts.steps, counts.trajectories, counts.tokens);
    metrics[kReturnSquares] = spread.target;
    metrics[kResidualSquares] = spread.residual;
    metrics[kValueGradientScale] = 1.0;
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
