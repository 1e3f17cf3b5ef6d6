// What the two forms of the policy loss share beside the mathematics of a step: the center of the
// ratio, and the end of a call.
#pragma once

#include "last_block.cuh"
#include "policy_step.cuh"

namespace steppo::cuda {

constexpr int kThreads = 256;
// The last bit of a sum must not depend on the card. As many blocks have a part in the workspace.
constexpr std::int64_t kStepBlocks = 255;

// Sums over steps, and the sum of 1 / count, which a reduction may count.
struct CallSums {
  PolicySums sums;
  double trajectories = 0;
};

STEPPO_DEVICE void merge(CallSums& total, const CallSums& other) {
  steppo::merge(total.sums, other.sums);
  total.trajectories += other.trajectories;
}

// The sums of a thread, from the beginning. They lie in shared memory: their thirty registers are
// wanted while a step is worked out.
STEPPO_DEVICE CallSums& sums_of_thread() {
  STEPPO_SHARED(Numbers<CallSums>[kThreads], sums);
  put(sums[threadIdx.x].at, CallSums{});
  return *reinterpret_cast<CallSums*>(sums[threadIdx.x].at);
}

// Makes loss and metrics of what the first `blocks` blocks have. All threads of all blocks call it.
template <class T>
STEPPO_DEVICE void finish_call(const CallSums& own, int blocks, const PolicyTensors& tensors,
                               const PolicyConfig& config, Workspace* workspace) {
  const CallSums* const whole = merge_grid<kThreads>(own, blocks, workspace);
  // Another thread than the one that merged: it finds the sums in memory.
  if (whole == nullptr || threadIdx.x != kThreads - 1) return;
  const double counted =
      reduction_count(config.reduction, whole->sums.steps, whole->trajectories, whole->sums.tokens);
  const bool is_given = tensors.normalizer != nullptr;
  const double total = is_given ? *tensors.normalizer : counted > 1.0 ? counted : 1.0;
  finish<T>(whole->sums, config, total, is_given ? total : counted, 1.0 / total, tensors);
}

// mu of the centered ratio is the mean of z over all action tokens. It is known before any step is,
// and so it takes a launch of its own, unless it is given.
inline bool needs_center(const PolicyTensors& tensors, const PolicyConfig& config) {
  return config.ratio == kCentered && tensors.ratio_center == nullptr;
}

STEPPO_DEVICE double center_of(const PolicyTensors& tensors, const PolicyConfig& config,
                               const Workspace* workspace) {
  if (config.ratio != kCentered) return 0;
  return tensors.ratio_center != nullptr ? *tensors.ratio_center : workspace->center;
}

// The sum of z as it is pooled, and the number of tokens.
struct Center {
  double z = 0, tokens = 0;

  // Adds token t, whose advantage is that of `owner`.
  template <class T>
  STEPPO_MEMBER void add(const PolicyCall<T>& call, const PolicyConfig& config, std::int64_t t,
                         std::int64_t owner) {
    double one =
        static_cast<double>(call.log_probs[t]) - static_cast<double>(call.old_log_probs[t]);
    if (clips_tokens(config)) {
      one = held_log_ratio<double>(one, static_cast<double>(call.advantages[owner]), config);
    }
    z += one;
    tokens += 1;
  }
};

STEPPO_DEVICE void merge(Center& total, const Center& other) {
  total.z += other.z;
  total.tokens += other.tokens;
}

// Leaves mu in the workspace. All threads of all blocks call it.
STEPPO_DEVICE void leave_center(const Center& own, Workspace* workspace) {
  const Center* const whole = merge_grid<kThreads>(own, static_cast<int>(gridDim.x), workspace);
  if (whole == nullptr || threadIdx.x != kThreads - 1) return;
  workspace->center = whole->tokens > 0 ? whole->z / whole->tokens : 0.0;
}

}  // namespace steppo::cuda
