// The policy loss on a StepLayout: see losses/policy_loss.py and backends/operators.py of the
// package.
#include <algorithm>

#include "last_block.cuh"
#include "policy_call.cuh"

namespace steppo::cuda {
namespace {

constexpr std::int64_t kClearBlocks = 256;

// mu of the centered ratio: the mean of z over all action tokens.
template <class T>
__global__ void __launch_bounds__(kThreads)
    center_kernel(const PolicyTensors tensors, const Steps steps, const PolicyConfig config,
                  Workspace* workspace) {
  const PolicyArrays<T> call = arrays_of<T>(tensors);
  Center& sum = sum_of_thread<kThreads, Center>();
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < steps.num_actions;
       i += stride) {
    const std::int64_t t = steps.token_index[i];
    sum.add(call, config, t, call.advantages_per_token ? t : steps.step_ids[t]);
  }
  leave_center(workspace);
}

// Zeroes the gradients of tokens that are no action's.
template <class T>
STEPPO_DEVICE void clear(const PolicyArrays<T>& call, const Steps& steps, std::int64_t block,
                         std::int64_t blocks) {
  for (std::int64_t t = block * kThreads + threadIdx.x; t < steps.num_tokens;
       t += blocks * kThreads) {
    if (steps.step_ids[t] >= 0) continue;
    if (call.grad_log_probs != nullptr) call.grad_log_probs[t] = T(0);
    if (call.grad_entropy != nullptr) call.grad_entropy[t] = T(0);
  }
}

// Some blocks take steps, `lanes` lanes each, and the others the tokens that are no action's.
template <class T, int lanes, bool by_token>
__global__ void __launch_bounds__(kThreads, 2)
    policy_loss_kernel(const PolicyTensors tensors, const Steps steps, const PolicyConfig config,
                       Workspace* workspace, int step_blocks) {
  const PolicyArrays<T> call = arrays_of<T>(tensors);
  CallSums& own = sum_of_thread<kThreads, CallSums>();
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
      const double log_ratio =
          add_step<lanes, by_token>(call, step, config, weight, center, own.sums);
      if (is_there && lane == 0) {
        static_cast<T*>(tensors.step_log_ratio)[s] = static_cast<T>(log_ratio);
      }
    }
  }
  finish_call<T>(step_blocks, tensors, config, workspace);
}

template <class T, int lanes>
void launch_by(const Launcher& launch, const PolicyTensors& tensors, const Steps& steps,
               const PolicyConfig& config, Workspace* workspace) {
  const std::int64_t step_blocks = step_blocks_for(steps.num_steps * lanes);
  const bool clears = tensors.grad_log_probs != nullptr || tensors.grad_entropy != nullptr;
  const std::int64_t wanted = clears ? ceil_div(steps.num_tokens, kThreads * 4) : 0;
  const std::int64_t clear_blocks = std::min(wanted, most_blocks(kClearBlocks));
  launch(config.ratio == kToken ? listed<policy_loss_kernel<T, lanes, true>>()
                                : listed<policy_loss_kernel<T, lanes, false>>(),
         step_blocks + clear_blocks, kThreads, tensors, steps, config, workspace,
         static_cast<int>(step_blocks));
}

}  // namespace

void policy_loss(const PolicyTensors& tensors, const Steps& steps, const PolicyConfig& config,
                 const Place& place) {
  const Launcher launch("policy_loss", place);
  Workspace* const workspace = static_cast<Workspace*>(place.workspace);
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    // The mean is known before any step is, and so it takes a launch of its own.
    if (needs_center(tensors, config) && steps.num_actions > 0) {
      launch(listed<center_kernel<T>>(), step_blocks_for(steps.num_actions), kThreads, tensors,
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
