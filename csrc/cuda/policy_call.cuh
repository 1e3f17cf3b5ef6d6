// What the two forms of the policy loss share beside the mathematics of a step: the center of the
// ratio, and the end of a call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include "last_block.cuh"
#include "launch.h"
#include "policy_step.cuh"

namespace steppo::cuda {

constexpr int kThreads = 256;
// From this length on a block may share a step, where steps are few: a warp would wait for one load
// of its tokens after the other. A thread of a block waits once.
constexpr std::int64_t kLongStep = 4 * kThreads;

// What a kernel is compiled for. A plain call, of steps with one ratio each, clipped, and nothing
// beside, needs half of the instructions on a layout and three fifths on a mask.
enum Form { kPlain, kOfSteps, kOfTokens };

// Blocks that a multiprocessor has registers for. In fp64, which is there to check the others, it
// has them for one.
template <class T, int form>
constexpr int kBlocksOfCore = sizeof(T) > 4    ? 1
                              : form == kPlain ? 3
                                               : 2;

// The most blocks: what the larger GPUs run at once. The last bit of a sum must not depend on the
// card.
constexpr std::int64_t most_step_blocks(Form form) {
  return form == kPlain ? Workspace::kParts : Workspace::kParts * 2 / 3;
}

// `is_more` is what else a plain call of the one form lacks.
inline Form form_of(const PolicyTensors& tensors, const PolicyConfig& config, bool is_more) {
  if (config.ratio == kToken) return kOfTokens;
  const bool has_more = is_more || tensors.ref_log_probs != nullptr || tensors.entropy != nullptr ||
                        tensors.is_weights != nullptr || tensors.step_weights != nullptr ||
                        tensors.clip_low != nullptr || tensors.clip_high != nullptr ||
                        clips_tokens(config) || config.surrogate != kClip || config.dual_clip > 0 ||
                        config.kl_coef != 0 || config.entropy_coef != 0;
  return has_more ? kOfSteps : kPlain;
}

// Lets the compiler know what a plain call lacks. Tokens of a mask have advantages of their own.
template <class T>
STEPPO_DEVICE void leave_out(PolicyArrays<T>& call, PolicyConfig& config) {
  call.ref_log_probs = call.entropy = call.is_weights = nullptr;
  call.step_weights = call.clip_low = call.clip_high = nullptr;
  call.is_weights_per_token = false;
  call.grad_entropy = nullptr;
  config.token_clip_low = config.token_clip_high = std::numeric_limits<double>::infinity();
  config.surrogate = kClip;
  config.dual_clip = config.kl_coef = config.entropy_coef = 0;
}

// Sums over steps, and the sum of 1 / count, which a reduction may count.
struct CallSums {
  PolicySums sums;
  double trajectories = 0;
};

// How their fields join, by number, as in `merge` of those sums. Neighbouring fields join alike:
// the greatest ratio is the least of the negative ones.
struct CallJoins {
  struct Least {
    static constexpr double kNone = std::numeric_limits<double>::infinity();

    STEPPO_DEVICE double of(double a, double b) { return lesser(a, b); }
  };

  static_assert(offsetof(CallSums, sums) == 0, "fields have the numbers of those of `sums`");
  static constexpr int kRatioMin = offsetof(PolicySums, ratio_min) / sizeof(double);
  static constexpr int kRatioMax = offsetof(PolicySums, ratio_max) / sizeof(double);
  static_assert(kRatioMin % 2 == 0 && kRatioMax == kRatioMin + 1, "two lanes of a warp join them");

  template <class F>
  STEPPO_DEVICE double with(int first, F&& body) {
    return first / 2 == kRatioMin / 2 ? body(Least{}) : body(Added{});
  }

  STEPPO_DEVICE double turned(int field, double number) {
    return field == kRatioMax ? -number : number;
  }
};

// Counters from here on hold the runs of rows between two launches.
constexpr int kFirstRunCounter = 1;

// Makes loss and metrics of the sums of all threads, which all call it. The runs of so many rows
// have been counted, and are forgotten.
template <class T>
STEPPO_DEVICE void finish_call(const PolicyTensors& tensors, const PolicyConfig& config,
                               Workspace* workspace, int counted_rows = 0) {
  const CallSums* const whole = merged_over_grid<kThreads, CallSums, CallJoins>(workspace);
  if (whole != nullptr) {
    for (int row = threadIdx.x; row < counted_rows; row += kThreads) {
      workspace->counters[kFirstRunCounter + row] = 0;
    }
  }
  if (whole == nullptr || threadIdx.x >= kWarp) return;
  const double counted =
      reduction_count(config.reduction, whole->sums.steps, whole->trajectories, whole->sums.tokens);
  const bool is_given = tensors.normalizer.is_given;
  const double total = is_given ? value_of(tensors.normalizer) : counted > 1.0 ? counted : 1.0;
  // Each lane has a quotient of its own: a division takes long, but not that of all lanes together.
  static_assert(kNumPolicyMetrics < kWarp);
  const int lane = threadIdx.x;
  Quotient mine{1.0, total};
  if (lane < kNumPolicyMetrics) {
    mine = policy_metric(static_cast<PolicyMetric>(lane), whole->sums, total,
                         is_given ? total : counted);
  }
  const double number = mine.over / mine.under;
  if (lane < kNumPolicyMetrics) tensors.metrics[lane] = number;
  if (lane == kNumPolicyMetrics && tensors.gradient_scale != nullptr) {
    *tensors.gradient_scale = number;
  }
  const double loss = policy_loss_of(config, __shfl_sync(kAllLanes, number, kPolicyLoss),
                                     __shfl_sync(kAllLanes, number, kKLLoss),
                                     __shfl_sync(kAllLanes, number, kEntropy));
  if (lane == 0) *static_cast<T*>(tensors.loss) = static_cast<T>(loss);
}

// As many blocks as there is work for, so many threads.
inline std::int64_t step_blocks_for(std::int64_t threads, Form form = kOfSteps) {
  const std::int64_t needed = ceil_div(threads, kThreads);
  // One block at least, which finishes.
  return std::clamp<std::int64_t>(needed, 1, most_blocks(most_step_blocks(form)));
}

// mu of the centered ratio is the mean of z over all action tokens. It is known before any step is,
// and so it takes a launch of its own, unless it is given.
inline bool needs_center(const PolicyTensors& tensors, const PolicyConfig& config) {
  return config.ratio == kCentered && !tensors.ratio_center.is_given;
}

STEPPO_DEVICE double center_of(const PolicyTensors& tensors, const PolicyConfig& config,
                               const Workspace* workspace) {
  if (config.ratio != kCentered) return 0;
  return tensors.ratio_center.is_given ? value_of(tensors.ratio_center) : workspace->center;
}

// The sum of z as it is pooled, and the number of tokens.
struct Center {
  double z = 0, tokens = 0;

  // Adds token t, whose advantage is that of `owner`.
  template <class T>
  STEPPO_MEMBER void add(const PolicyArrays<T>& call, const PolicyConfig& config, std::int64_t t,
                         std::int64_t owner) {
    z += pooled_log_ratio(call, config, clips_tokens(config), t, owner);
    tokens += 1;
  }
};

// Leaves mu in the workspace, of the sums of the threads of all blocks, which call it.
STEPPO_DEVICE void leave_center(Workspace* workspace) {
  const Center* const whole = merged_over_grid<kThreads, Center>(workspace);
  if (whole == nullptr || threadIdx.x > 0) return;
  workspace->center = whole->tokens > 0 ? whole->z / whole->tokens : 0.0;
}

}  // namespace steppo::cuda
