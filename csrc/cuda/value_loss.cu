// The clipped value loss on steps: see steppo_kernels/losses/value_loss.py.
#include <algorithm>

#include "fill.cuh"
#include "last_block.cuh"
#include "launch.h"
#include "steppo/cuda.h"
#include "steppo/value_sums.h"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 256;
// In the end a thread takes what a block has left.
constexpr int kBlocks = kThreads;

// What the steps of a thread, of a block and of all blocks add up to.
struct Sums {
  ValueCounts counts;
  ValueSums values;
};

// What a block leaves to the last one. Its squares are deviations from its own means.
struct Left {
  Sums sums;
  ValueSquares squares;
};
static_assert(kBlocks * sizeof(Left) <= sizeof(Workspace::partials));

// Calls body(step, length) for the steps of a thread.
template <class F>
STEPPO_DEVICE void for_steps(const States& states, F&& body) {
  for (std::int64_t step = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
       step < states.num_steps; step += std::int64_t{gridDim.x} * kThreads) {
    body(step, states.step_lengths[step]);
  }
}

// The gradient is written before the denominator is known: its scale is the last metric.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    value_loss_kernel(const ValueTensors tensors, const States states, const ValueConfig config,
                      Workspace* workspace) {
  const T* const values = static_cast<const T*>(tensors.values);
  const T* const returns = static_cast<const T*>(tensors.returns);
  const T* const old_values = static_cast<const T*>(tensors.old_values);
  const T* const step_weights = static_cast<const T*>(tensors.step_weights);
  T* const grad = static_cast<T*>(tensors.grad_values);
  const auto place_of = [&](std::int64_t step, bool per_token) {
    return per_token ? states.state_index[step] : step;
  };
  Sums& sums = sum_of_thread<kThreads, Sums>();
  for_steps(states, [&](std::int64_t step, std::int32_t length) {
    if (length == 0) {
      if (grad != nullptr && !tensors.values_per_token) grad[step] = T(0);
      return;
    }
    const std::int64_t at = place_of(step, tensors.values_per_token);
    const std::int32_t trajectory_count = states.trajectory_counts[step];
    const double value = values[at], target = returns[place_of(step, tensors.returns_per_token)];
    const bool has_old = old_values != nullptr;
    const double old = has_old ? old_values[place_of(step, tensors.old_values_per_token)] : 0.0;
    const ValueLoss found = value_step_loss(value, target, has_old, old, config.clip);
    const double weight = weight_of(step_weights, step, config.reduction, length, trajectory_count);
    if (grad != nullptr) grad[at] = static_cast<T>(weight * found.slope);
    add_step(sums.counts, length, trajectory_count);
    add_step(sums.values, found, weight, value, target);
  });
  const Sums own = merged_over_block<kThreads, Sums>();
  const ValueMeans means = value_means(own.counts, own.values);
  ValueSquares& squares = sum_of_thread<kThreads, ValueSquares>();
  for_steps(states, [&](std::int64_t step, std::int32_t length) {
    if (length == 0) return;
    add_step(squares, means, values[place_of(step, tensors.values_per_token)],
             returns[place_of(step, tensors.returns_per_token)]);
  });
  const ValueSquares own_squares = merged_over_block<kThreads, ValueSquares>();

  Left* const left = reinterpret_cast<Left*>(workspace->partials);
  if (threadIdx.x == 0) left[blockIdx.x] = {own, own_squares};
  if (!is_last_block(&workspace->counters[0], gridDim.x)) return;
  const Left mine = threadIdx.x < gridDim.x ? left[threadIdx.x] : Left{};
  sum_of_thread<kThreads, Sums>() = mine.sums;
  const Sums all = merged_over_block<kThreads, Sums>();
  sum_of_thread<kThreads, ValueSquares>() =
      squares_from(value_means(all.counts, all.values), mine.squares,
                   value_means(mine.sums.counts, mine.sums.values), mine.sums.counts.steps);
  const ValueSquares all_squares = merged_over_block<kThreads, ValueSquares>();
  if (threadIdx.x > 0) return;
  const double total = value_total(config.reduction, all.counts, tensors.normalizer);
  *static_cast<T*>(tensors.loss) = static_cast<T>(all.values.loss / total);
  write_value_metrics(config.reduction, all.counts, all.values, all_squares, tensors.normalizer,
                      tensors.metrics);
  if (tensors.gradient_scale != nullptr) *tensors.gradient_scale = 1 / total;
}

}  // namespace

void value_loss(const ValueTensors& tensors, const States& states, const ValueConfig& config,
                const Place& place) {
  const Launcher launch("value_loss", place);
  // Without steps there are still metrics.
  const std::int64_t blocks = ceil_div(states.num_steps, kThreads);
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    // A launch of its own: states may lie anywhere, so that in one launch a block could not know
    // whether another has yet to zero what it writes.
    if (tensors.grad_values != nullptr && tensors.values_per_token) {
      fill_with_zeros(launch, static_cast<T*>(tensors.grad_values), tensors.num_values);
    }
    launch(listed<value_loss_kernel<T>>(),
           std::clamp<std::int64_t>(blocks, 1, most_blocks(kBlocks)), kThreads, tensors, states,
           config, static_cast<Workspace*>(place.workspace));
  });
}

}  // namespace steppo::cuda
