// What the policy loss adds up over steps, and what becomes of it: loss and metrics, for any
// device.
#pragma once

#include <limits>

#include "steppo/step_math.h"

namespace steppo {

// Sums over some steps. Every field is a double, so that a device may hand on field by field.
struct PolicySums {
  double policy = 0, kl = 0, entropy = 0;
  double ratio = 0;
  double ratio_min = std::numeric_limits<double>::infinity();
  double ratio_max = -std::numeric_limits<double>::infinity();
  double clipped_low = 0, clipped_high = 0, clipped_tokens = 0;
  double z = 0, k3 = 0, dead = 0;
  double steps = 0, tokens = 0;
};

STEPPO_FN void merge(PolicySums& sums, const PolicySums& other) {
  sums.policy += other.policy;
  sums.kl += other.kl;
  sums.entropy += other.entropy;
  sums.ratio += other.ratio;
  sums.ratio_min = lesser(sums.ratio_min, other.ratio_min);
  sums.ratio_max = greater(sums.ratio_max, other.ratio_max);
  sums.clipped_low += other.clipped_low;
  sums.clipped_high += other.clipped_high;
  sums.clipped_tokens += other.clipped_tokens;
  sums.z += other.z;
  sums.k3 += other.k3;
  sums.dead += other.dead;
  sums.steps += other.steps;
  sums.tokens += other.tokens;
}

STEPPO_FN void add_ratio(PolicySums& sums, double ratio) {
  sums.ratio += ratio;
  sums.ratio_min = lesser(sums.ratio_min, ratio);
  sums.ratio_max = greater(sums.ratio_max, ratio);
}

// Turns the sums of a call into its loss and metrics. `total` is the denominator, `count` what the
// reduction counts unless a normalizer was given.
template <class T>
STEPPO_FN void finish(const PolicySums& sums, const PolicyConfig& config, double total,
                      double count, const PolicyTensors& tensors) {
  double* const metrics = tensors.metrics;
  const double steps = sums.steps > 0 ? sums.steps : 1, tokens = sums.tokens > 0 ? sums.tokens : 1;
  const bool is_empty = sums.steps == 0;
  metrics[kPolicyLoss] = sums.policy / total;
  metrics[kKLLoss] = sums.kl / total;
  metrics[kEntropy] = sums.entropy / total;
  metrics[kRatioMean] = is_empty ? 1.0 : sums.ratio / steps;
  metrics[kRatioMin] = is_empty ? 1.0 : sums.ratio_min;
  metrics[kRatioMax] = is_empty ? 1.0 : sums.ratio_max;
  metrics[kClipFraction] = (sums.clipped_low + sums.clipped_high) / steps;
  metrics[kClipFractionLow] = sums.clipped_low / steps;
  metrics[kClipFractionHigh] = sums.clipped_high / steps;
  metrics[kTokenClipFraction] = sums.clipped_tokens / tokens;
  metrics[kApproxKL] = -sums.z / tokens;
  metrics[kApproxKLK3] = sums.k3 / tokens;
  metrics[kDeadTokenFraction] = sums.dead / tokens;
  metrics[kNumSteps] = sums.steps;
  metrics[kNumTokens] = sums.tokens;
  metrics[kPolicyDenominator] = count;
  if (tensors.gradient_scale != nullptr) *tensors.gradient_scale = 1 / total;
  *static_cast<T*>(tensors.loss) =
      static_cast<T>(metrics[kPolicyLoss] + config.kl_coef * metrics[kKLLoss] -
                     config.entropy_coef * metrics[kEntropy]);
}

}  // namespace steppo
