// What the policy loss adds up over steps, and what becomes of it: loss and metrics, for any
// device.
#pragma once

#include <cstddef>
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

struct Quotient {
  double over, under;
};

// What a metric is made of. `total` is the denominator of the loss, `count` what the reduction
// counts unless a normalizer was given. The metrics have the order of the fields but for one, which
// is the sum of two. Lanes of a GPU that take a metric each go one way together.
STEPPO_FN Quotient policy_metric(PolicyMetric metric, const PolicySums& sums, double total,
                                 double count) {
  static_assert(offsetof(PolicySums, clipped_low) == kClipFraction * sizeof(double) &&
                    offsetof(PolicySums, tokens) == (kNumTokens - 1) * sizeof(double),
                "metrics have the order of fields");
  const double* const fields = reinterpret_cast<const double*>(&sums);
  const int field = metric - (metric > kClipFraction);
  double over = metric == kPolicyDenominator ? count : fields[field];
  if (metric == kClipFraction) over += sums.clipped_high;
  if (metric == kApproxKL) over = -over;
  // Without a step every ratio is 1.
  if (sums.steps == 0 && metric >= kRatioMean && metric <= kRatioMax) over = 1.0;
  const bool is_of_steps =
      metric == kRatioMean || (metric >= kClipFraction && metric <= kClipFractionHigh);
  const bool is_of_tokens = metric >= kTokenClipFraction && metric <= kDeadTokenFraction;
  const double steps = sums.steps > 0 ? sums.steps : 1, tokens = sums.tokens > 0 ? sums.tokens : 1;
  return {over, metric <= kEntropy ? total : is_of_steps ? steps : is_of_tokens ? tokens : 1.0};
}

// The loss, made of metrics.
STEPPO_FN double policy_loss_of(const PolicyConfig& config, double policy, double kl,
                                double entropy) {
  return policy + config.kl_coef * kl - config.entropy_coef * entropy;
}

// Turns the sums of a call into its loss and metrics.
template <class T>
STEPPO_FN void finish(const PolicySums& sums, const PolicyConfig& config, double total,
                      double count, const PolicyTensors& tensors) {
  double* const metrics = tensors.metrics;
  for (int k = 0; k < kNumPolicyMetrics; ++k) {
    const Quotient metric = policy_metric(static_cast<PolicyMetric>(k), sums, total, count);
    metrics[k] = metric.over / metric.under;
  }
  *static_cast<T*>(tensors.loss) = static_cast<T>(
      policy_loss_of(config, metrics[kPolicyLoss], metrics[kKLLoss], metrics[kEntropy]));
}

}  // namespace steppo
