// The clipped value loss on steps: see steppo_kernels/losses/value_loss.py.
#include "kernel.h"
#include "steppo/value_sums.h"

namespace steppo::cpu::STEPPO_ISA {
namespace {

// Asks for what a later step reads: values lie wherever steps begin.
constexpr int64_t kStepsAhead = 16;

template <class T>
STEPPO_FN void fetch(const T* values, const T* returns, const T* old, const int64_t* state_index,
                     int64_t step) {
  __builtin_prefetch(values + state_index[step]);
  if (returns != nullptr) __builtin_prefetch(returns + state_index[step]);
  if (old != nullptr) __builtin_prefetch(old + state_index[step]);
}

// Adds up what body(s, sums) adds to `sums` for the steps s that are not empty.
template <class S, class F>
S sum_steps(const int32_t* step_lengths, int64_t num_steps, int threads, F&& body) {
  constexpr int64_t kSteps = 2048;
  Buffer<S> partial(ceil_div(num_steps, kSteps));
  parallel_blocks(num_steps, kSteps, threads, [&](int64_t b, int64_t begin, int64_t end) {
    S sums{};
    for (int64_t s = begin; s < end; ++s) {
      if (step_lengths[s] != 0) body(s, sums);
    }
    partial[b] = sums;
  });
  S total{};
  for (int64_t b = 0; b < ceil_div(num_steps, kSteps); ++b) merge(total, partial[b]);
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
    const T* returns = static_cast<const T*>(tensors.returns);
    const T* old = static_cast<const T*>(tensors.old_values);
    const T* weights = static_cast<const T*>(tensors.step_weights);
    T* grad = static_cast<T*>(tensors.grad_values);
    const Reduction kind = config.reduction;
    if (grad != nullptr) {
      parallel_blocks(tensors.num_values, kBlock, threads,
                      [&](int64_t, int64_t begin, int64_t end) { fill(grad, begin, end, zero); });
    }
    const auto counts =
        sum_steps<ValueCounts>(states.step_lengths, num_steps, threads, [&](int64_t s, auto& sum) {
          add_step(sum, states.step_lengths[s], states.trajectory_counts[s]);
        });
    const double total = value_total(kind, counts, tensors.normalizer);
    const auto at = [&](bool per_token, int64_t s) {
      return per_token ? states.state_index[s] : s;
    };
    const auto sums =
        sum_steps<ValueSums>(states.step_lengths, num_steps, threads, [&](int64_t s, auto& sum) {
          if (tensors.values_per_token && s + kStepsAhead < num_steps) {
            fetch(v, tensors.returns_per_token ? returns : nullptr,
                  tensors.old_values_per_token ? old : nullptr, states.state_index,
                  s + kStepsAhead);
          }
          const double value = v[at(tensors.values_per_token, s)];
          const double target = returns[at(tensors.returns_per_token, s)];
          const double before = old == nullptr ? 0.0 : old[at(tensors.old_values_per_token, s)];
          const ValueLoss step =
              value_step_loss(value, target, old != nullptr, before, config.clip);
          const double weight =
              weight_of(weights, s, kind, states.step_lengths[s], states.trajectory_counts[s]);
          add_step(sum, step, weight, value, target);
          if (grad != nullptr) {
            grad[at(tensors.values_per_token, s)] = static_cast<T>(weight / total * step.slope);
          }
        });
    const ValueMeans means = value_means(counts, sums);
    const auto squares =
        sum_steps<ValueSquares>(states.step_lengths, num_steps, threads, [&](int64_t s, auto& sum) {
          add_step(sum, means, v[at(tensors.values_per_token, s)],
                   returns[at(tensors.returns_per_token, s)]);
        });
    *static_cast<T*>(tensors.loss) = static_cast<T>(sums.loss / total);
    // The denominator was known before the gradient was written.
    write_value_metrics(kind, counts, sums, squares, tensors.normalizer, tensors.metrics);
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
