// The policy loss on a StepLayout: see losses/policy_loss.py and backends/operators.py of the
// package.
#include <algorithm>

#include "last_block.cuh"
#include "policy_call.cuh"

namespace steppo::cuda {
namespace {

// So many steps are the work of all blocks two or three times, if each has a warp.
constexpr std::int64_t kFewSteps = 3 * kStepBlocks * kThreads / kWarp;

// Tokens whose ids a thread loads together.
constexpr int kIdsTogether = 8;

// mu of the centered ratio: the mean of z over all action tokens.
template <class T>
__global__ void __launch_bounds__(kThreads)
    center_kernel(const PolicyTensors tensors, const Steps steps, const PolicyConfig config,
                  Workspace* workspace) {
  const PolicyArrays<T> call = arrays_of<T>(tensors);
  Center sum;
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
#pragma unroll 4
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < steps.num_actions;
       i += stride) {
    const std::int64_t t = steps.token_index[i];
    sum.add(call, config, t, call.advantages_per_token ? t : steps.step_ids[t]);
  }
  sum_of_thread<kThreads, Center>() = sum;
  leave_center(workspace);
}

// Zeroes the gradients of tokens that are no action's. Neighbouring threads have neighbours.
template <class T>
STEPPO_DEVICE void clear(const PolicyArrays<T>& call, const Steps& steps) {
  if (call.grad_log_probs == nullptr && call.grad_entropy == nullptr) return;
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
       first < steps.num_tokens; first += kIdsTogether * stride) {
    std::int32_t ids[kIdsTogether];
#pragma unroll
    for (int k = 0; k < kIdsTogether; ++k) {
      const std::int64_t t = first + k * stride;
      ids[k] = t < steps.num_tokens ? steps.step_ids[t] : 0;
    }
#pragma unroll
    for (int k = 0; k < kIdsTogether; ++k) {
      if (ids[k] >= 0) continue;
      const std::int64_t t = first + k * stride;
      if (call.grad_log_probs != nullptr) call.grad_log_probs[t] = T(0);
      if (call.grad_entropy != nullptr) call.grad_entropy[t] = T(0);
    }
  }
}

// `lanes` lanes take a step.
template <class T, int lanes, int form>
__global__ void __launch_bounds__(kThreads, kBlocksOfCore<T>)
    policy_loss_kernel(const PolicyTensors tensors, const Steps steps, const PolicyConfig given,
                       Workspace* workspace) {
  PolicyArrays<T> call = arrays_of<T>(tensors);
  PolicyConfig config = given;
  if constexpr (form == kPlain) {
    leave_out(call, config);
    call.advantages_per_token = false;
  }
  CallSums& own = sum_of_thread<kThreads, CallSums>();
  clear(call, steps);
  const double center = center_of(tensors, config, workspace);
  constexpr int kGroups = kThreads / lanes;
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const std::int64_t stride = std::int64_t{gridDim.x} * kGroups;
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
      const bool counts = config.reduction == kTrajectoryMean;
      const double count = counts ? steps.trajectory_counts[s] : 1.0;
      weight =
          weight_of(call.step_weights, s, config.reduction, static_cast<double>(length), count);
      if (counts && lane == 0) own.trajectories += 1.0 / count;
    }
    const double log_ratio =
        add_step<lanes, form == kOfTokens>(call, step, config, weight, center, own.sums);
    if (is_there && lane == 0) {
      static_cast<T*>(tensors.step_log_ratio)[s] = static_cast<T>(log_ratio);
    }
  }
  finish_call<T>(tensors, config, workspace);
}

template <class T, int lanes>
void launch_by(const Launcher& launch, const PolicyTensors& tensors, const Steps& steps,
               const PolicyConfig& config, Workspace* workspace) {
  const std::int64_t threads =
      std::max(steps.num_steps * lanes, ceil_div(steps.num_tokens, kIdsTogether));
  const Form form = form_of(tensors, config, tensors.advantages_per_token);
  launch(form == kPlain     ? listed<policy_loss_kernel<T, lanes, kPlain>>()
         : form == kOfSteps ? listed<policy_loss_kernel<T, lanes, kOfSteps>>()
                            : listed<policy_loss_kernel<T, lanes, kOfTokens>>(),
         step_blocks_for(threads), kThreads, tensors, steps, config, workspace);
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
    // Lanes enough for all threads to have work, but each of them a few tokens.
    const std::int64_t length = steps.num_steps > 0 ? steps.num_actions / steps.num_steps : 0;
    if (length >= (steps.num_steps <= kFewSteps ? 32 : 256)) {
      launch_by<T, kWarp>(launch, tensors, steps, config, workspace);
    } else if (length >= 4) {
      launch_by<T, 8>(launch, tensors, steps, config, workspace);
    } else {
      launch_by<T, 1>(launch, tensors, steps, config, workspace);
    }
  });
}

}  // namespace steppo::cuda
