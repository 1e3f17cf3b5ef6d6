// The policy loss on a StepLayout: see losses/policy_loss.py and backends/operators.py of the
// package.
#include "last_block.cuh"
#include "launch.h"
#include "policy_step.cuh"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 256;
// The last bit of a sum must not depend on the card.
constexpr std::int64_t kStepBlocks = 255, kClearBlocks = 256;

// Sums over steps, and the sum of 1 / count, which a reduction may count.
struct CallSums {
  PolicySums sums;
  double trajectories = 0;
};

STEPPO_FN void merge(CallSums& total, const CallSums& other) {
  steppo::merge(total.sums, other.sums);
  total.trajectories += other.trajectories;
}

// mu of the centered ratio: the mean of z over all action tokens.
template <class T>
__global__ void __launch_bounds__(kThreads)
    center_kernel(const PolicyTensors tensors, const Steps steps, const PolicyConfig config,
                  Workspace* workspace) {
  const PolicyCall<T> call(tensors);
  double sum = 0;
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < steps.num_actions;
       i += stride) {
    const std::int64_t t = steps.token_index[i];
    double z = static_cast<double>(call.log_probs[t]) - static_cast<double>(call.old_log_probs[t]);
    if (clips_tokens(config)) {
      const std::int64_t owner = call.advantages_per_token ? t : steps.step_ids[t];
      z = held_log_ratio<double>(z, static_cast<double>(call.advantages[owner]), config);
    }
    sum += z;
  }
  Sum own{sum};
  if (!merge_grid<kThreads>(own, static_cast<int>(gridDim.x), workspace)) return;
  if (threadIdx.x == 0) workspace->center = own.value / static_cast<double>(steps.num_actions);
}

// Zeroes the gradients of tokens that are no action's.
template <class T>
STEPPO_DEVICE void clear(const PolicyCall<T>& call, const Steps& steps, std::int64_t block,
                         std::int64_t blocks) {
  for (std::int64_t t = block * kThreads + threadIdx.x; t < steps.num_tokens;
       t += blocks * kThreads) {
    if (steps.step_ids[t] >= 0) continue;
    if (call.grad_log_probs != nullptr) call.grad_log_probs[t] = T(0);
    if (call.grad_entropy != nullptr) call.grad_entropy[t] = T(0);
  }
}

// Some blocks take steps, `lanes` lanes each, and the others the tokens that are no action's.
template <class T, int lanes>
__global__ void __launch_bounds__(kThreads, 2)
    policy_loss_kernel(const PolicyTensors tensors, const Steps steps, const PolicyConfig config,
                       Workspace* workspace, int step_blocks) {
  const PolicyCall<T> call(tensors);
  CallSums own;
  if (static_cast<int>(blockIdx.x) >= step_blocks) {
    clear(call, steps, blockIdx.x - step_blocks, gridDim.x - step_blocks);
  } else {
    const double center = config.ratio != kCentered         ? 0.0
                          : tensors.ratio_center != nullptr ? *tensors.ratio_center
                                                            : workspace->center;
    constexpr int kGroups = kThreads / lanes;
    const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    const std::int64_t stride = std::int64_t{step_blocks} * kGroups;
    // The lanes of a warp meet in sums, and go through the loop together.
    for (std::int64_t first = std::int64_t{blockIdx.x} * kGroups; first < steps.num_steps;
         first += stride) {
      const std::int64_t s = first + group;
      const bool is_there = s < steps.num_steps;
      const std::int64_t begin = is_there ? steps.step_offsets[s] : 0;
      const std::int64_t length = is_there ? steps.step_offsets[s + 1] - begin : 0;
      const PolicyStep step{s, length, is_there ? steps.step_starts[s] : -1,
                            steps.token_index + begin, lane};
      double weight = 0;
      if (length > 0) {
        const double count = steps.trajectory_counts[s];
        weight = call.step_weights != nullptr
                     ? static_cast<double>(call.step_weights[s])
                     : step_weight(config.reduction, static_cast<double>(length), count);
        if (lane == 0) own.trajectories += 1.0 / count;
      }
      const double log_ratio = add_step<lanes>(call, step, config, weight, center, own.sums);
      if (is_there && lane == 0) {
        static_cast<T*>(tensors.step_log_ratio)[s] = static_cast<T>(log_ratio);
      }
    }
  }
  if (!merge_grid<kThreads>(own, step_blocks, workspace) || threadIdx.x != 0) return;
  const double counted = reduction_count(config.reduction, own.sums.steps, own.trajectories,
                                         static_cast<double>(steps.num_actions));
  const bool is_given = tensors.normalizer != nullptr;
  const double total = is_given ? *tensors.normalizer : counted > 1.0 ? counted : 1.0;
  finish<T>(own.sums, config, total, is_given ? total : counted, 1.0 / total, tensors);
}

template <class T, int lanes>
void launch_by(const Launcher& launch, const PolicyTensors& tensors, const Steps& steps,
               const PolicyConfig& config, Workspace* workspace) {
  const std::int64_t needed = ceil_div(steps.num_steps * lanes, kThreads);
  // One block at least, which finishes.
  const std::int64_t step_blocks = needed < 1 ? 1 : needed < kStepBlocks ? needed : kStepBlocks;
  const bool clears = tensors.grad_log_probs != nullptr || tensors.grad_entropy != nullptr;
  const std::int64_t wanted = clears ? ceil_div(steps.num_tokens, kThreads * 4) : 0;
  const std::int64_t clear_blocks = wanted < kClearBlocks ? wanted : kClearBlocks;
  launch(policy_loss_kernel<T, lanes>, step_blocks + clear_blocks, kThreads, tensors, steps, config,
         workspace, static_cast<int>(step_blocks));
}

}  // namespace

void policy_loss(const PolicyTensors& tensors, const Steps& steps, const PolicyConfig& config,
                 const Place& place) {
  const Launcher launch("policy_loss", place);
  Workspace* const workspace = static_cast<Workspace*>(place.workspace);
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    // The mean is known before any step is, and so it takes a launch of its own.
    if (config.ratio == kCentered && tensors.ratio_center == nullptr && steps.num_actions > 0) {
      const std::int64_t needed = ceil_div(steps.num_actions, kThreads);
      launch(center_kernel<T>, needed < kStepBlocks ? needed : kStepBlocks, kThreads, tensors,
             steps, config, workspace);
    }
    const std::int64_t length = steps.num_steps > 0 ? steps.num_actions / steps.num_steps : 0;
    if (length >= 16) {
      launch_by<T, kWarp>(launch, tensors, steps, config, workspace);
    } else if (length >= 2) {
      launch_by<T, 8>(launch, tensors, steps, config, workspace);
    } else {
      launch_by<T, 1>(launch, tensors, steps, config, workspace);
    }
  });
}

}  // namespace steppo::cuda
