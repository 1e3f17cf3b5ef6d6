// The policy loss of one step by some lanes of a warp: see csrc/cpu/policy_loss.h for the same on a
// CPU. Gradients lack the factor 1 / normalizer, which is known when every step has been seen.
#pragma once

#include "device.cuh"
#include "steppo/policy_arrays.h"
#include "steppo/policy_sums.h"

namespace steppo::cuda {

// A step, and the lane of those that share it. Positions are in one piece from `start`, or listed.
struct PolicyStep {
  std::int64_t index, length, start;
  const std::int64_t* listed;
  int lane;

  STEPPO_MEMBER std::int64_t at(std::int64_t i) const { return start >= 0 ? start + i : listed[i]; }
};

// What a first look at the tokens of a step adds up.
struct TokenTotals {
  double z = 0, held = 0, weights = 0, entropy = 0;
  // Tokens whose advantage is not that of the first one.
  double apart = 0;
};

template <int lanes, class T>
STEPPO_DEVICE TokenTotals look_at(const PolicyArrays<T>& call, const PolicyStep& step,
                                  const PolicyConfig& config, PolicySums& sums) {
  TokenTotals totals;
  const bool holds = clips_tokens(config);
  for (std::int64_t i = step.lane; i < step.length; i += lanes) {
    const std::int64_t t = step.at(i);
    const T z = call.log_probs[t] - call.old_log_probs[t];
    totals.z += static_cast<double>(z);
    sums.k3 += static_cast<double>(kl_penalty<kK3>(z).value);
    const T advantage = call.advantages[call.advantages_per_token ? t : step.index];
    if (call.advantages_per_token) totals.apart += advantage != call.advantages[step.at(0)];
    if (holds) totals.held += static_cast<double>(held_log_ratio(z, advantage, config));
    if (call.is_weights_per_token) totals.weights += static_cast<double>(call.is_weights[t]);
    if (call.entropy != nullptr) totals.entropy += static_cast<double>(call.entropy[t]);
  }
  totals.z = sum_of_lanes<lanes>(totals.z);
  if (call.advantages_per_token) totals.apart = sum_of_lanes<lanes>(totals.apart);
  if (holds) totals.held = sum_of_lanes<lanes>(totals.held);
  if (call.is_weights_per_token) totals.weights = sum_of_lanes<lanes>(totals.weights);
  if (call.entropy != nullptr) totals.entropy = sum_of_lanes<lanes>(totals.entropy);
  return totals;
}

// The factors of a step: its weight w_s, and L^-p.
struct StepFactors {
  double weight, scale;
};

// The KL penalty of a token: adds to `sums`, and returns what the gradient gets. A penalty that is
// only reported has none, whatever its slope is.
template <class T>
STEPPO_DEVICE T penalty_at(const PolicyArrays<T>& call, std::int64_t t, const PolicyConfig& config,
                           double share, PolicySums& sums) {
  if (call.ref_log_probs == nullptr) return T(0);
  const KL<T> found = penalty_of(config.kl_estimator, call.ref_log_probs[t] - call.log_probs[t]);
  sums.kl += share * static_cast<double>(found.value);
  const T coefficient = static_cast<T>(config.kl_coef * share);
  return coefficient == T(0) ? T(0) : coefficient * found.slope;
}

// Tokens that share the slope of their step.
template <int lanes, class T>
STEPPO_DEVICE void take_together(const PolicyArrays<T>& call, const PolicyStep& step,
                                 const PolicyConfig& config, const Point<double>& point,
                                 const TokenTotals& totals, const StepFactors& factors,
                                 bool is_alive, PolicySums& sums) {
  const double n = static_cast<double>(step.length);
  const Unit<double> unit = step_unit(point, config);
  const bool by_token = call.is_weights_per_token;
  const double is_weight = call.is_weights == nullptr ? 1.0
                           : by_token ? totals.weights / n
                                      : static_cast<double>(call.is_weights[step.index]);
  if (step.lane == 0) {
    sums.policy += factors.weight * unit.value * is_weight;
    add_ratio(sums, point.ratio);
    if (unit.is_clipped) {
      (point.ratio < 1 ? sums.clipped_low : sums.clipped_high) += 1;
      sums.clipped_tokens += n;
    }
  }
  // What is 0 stays 0, whatever the weights are.
  double slope = unit.slope == 0 ? 0.0 : factors.weight * unit.slope * factors.scale;
  const bool weighs_tokens = by_token && slope != 0;
  if (!weighs_tokens && slope != 0) slope *= is_weight;
  for (std::int64_t i = step.lane; i < step.length; i += lanes) {
    const std::int64_t t = step.at(i);
    T grad = static_cast<T>(slope);
    if (weighs_tokens) grad *= call.is_weights[t];
    grad += penalty_at(call, t, config, factors.weight / n, sums);
    sums.dead += !is_alive && grad == T(0);
    if (call.grad_log_probs != nullptr) call.grad_log_probs[t] = grad;
  }
}

// Tokens with advantages, ratios or clips of their own. `unit_at(t)` is what the policy part gives.
template <int lanes, class T, class UnitAt>
STEPPO_DEVICE void take_apart(const PolicyArrays<T>& call, const PolicyStep& step,
                              const PolicyConfig& config, const StepFactors& factors,
                              bool has_ratios, bool is_alive, PolicySums& sums, UnitAt&& unit_at) {
  const double n = static_cast<double>(step.length), share = factors.weight / n;
  const bool by_token = call.is_weights_per_token;
  const double is_weight = call.is_weights != nullptr && !by_token
                               ? static_cast<double>(call.is_weights[step.index])
                               : 1.0;
  const T factor = static_cast<T>(factors.weight * factors.scale * is_weight);
  for (std::int64_t i = step.lane; i < step.length; i += lanes) {
    const std::int64_t t = step.at(i);
    const TokenUnit<T> unit = unit_at(t);
    T grad = unit.slope == T(0) ? T(0) : unit.slope * factor, value = unit.value;
    if (by_token) {
      const T own = call.is_weights[t];
      grad = grad == T(0) ? T(0) : grad * own;
      value *= own;
    }
    sums.policy += share * static_cast<double>(value) * is_weight;
    sums.clipped_low += static_cast<double>(unit.clipped_low) / n;
    sums.clipped_high += static_cast<double>(unit.clipped_high) / n;
    sums.clipped_tokens += static_cast<double>(unit.clipped_low + unit.clipped_high);
    if (has_ratios) {
      const double ratio = static_cast<double>(unit.ratio);
      sums.ratio += ratio / n;
      sums.ratio_min = lesser(sums.ratio_min, ratio);
      sums.ratio_max = greater(sums.ratio_max, ratio);
    }
    grad += penalty_at(call, t, config, share, sums);
    sums.dead += !is_alive && grad == T(0);
    if (call.grad_log_probs != nullptr) call.grad_log_probs[t] = grad;
  }
}

// Adds a step to the sums of its lanes, and writes the gradients of its tokens. All lanes of a warp
// call it together, with a step or an empty one. Returns log rho. `by_token` is the ratio of single
// tokens.
template <int lanes, bool by_token, class T>
STEPPO_DEVICE double add_step(const PolicyArrays<T>& call, const PolicyStep& step,
                              const PolicyConfig& config, double weight, double center,
                              PolicySums& sums) {
  const TokenTotals totals = look_at<lanes>(call, step, config, sums);
  if (step.length == 0) return 0;
  const double n = static_cast<double>(step.length);
  const StepFactors factors{weight, ratio_scale(config.ratio, n)};
  const bool holds = clips_tokens(config), is_apart = totals.apart > 0;
  const double pooled = holds ? totals.held : totals.z;
  const double log_ratio = center + factors.scale * (pooled - center * n);
  const double low =
      call.clip_low == nullptr ? config.clip_low : static_cast<double>(call.clip_low[step.index]);
  const double high = call.clip_high == nullptr ? config.clip_high
                                                : static_cast<double>(call.clip_high[step.index]);
  const double bonus = config.entropy_coef == 0 ? 0.0 : -config.entropy_coef * weight / n;
  const bool is_alive = call.entropy != nullptr && bonus != 0;
  const auto advantage_at = [&](std::int64_t t) {
    return call.advantages[call.advantages_per_token ? t : step.index];
  };
  if constexpr (by_token) {
    with_surrogate(config.surrogate, [&](auto kind) {
      take_apart<lanes>(call, step, config, factors, true, is_alive, sums, [&](std::int64_t t) {
        return token_by_itself<decltype(kind)::value>(call.log_probs[t], call.old_log_probs[t],
                                                      advantage_at(t), static_cast<T>(low),
                                                      static_cast<T>(high), config);
      });
      return 0;
    });
  } else {
    const double advantage = static_cast<double>(advantage_at(step.at(0)));
    const Point<double> point{
        log_ratio, ratio_of(log_ratio, config.log_ratio_max), advantage, low, high, 0.0};
    if (is_apart || holds) {
      const SignedUnits units = signed_units(point, config);
      if (step.lane == 0) add_ratio(sums, point.ratio);
      take_apart<lanes>(call, step, config, factors, false, is_alive, sums, [&](std::int64_t t) {
        const T z = call.log_probs[t] - call.old_log_probs[t];
        return token_of_step(advantage_at(t), z, holds, units, config);
      });
    } else {
      take_together<lanes>(call, step, config, point, totals, factors, is_alive, sums);
    }
  }
  if (call.grad_entropy != nullptr) {
    for (std::int64_t i = step.lane; i < step.length; i += lanes) {
      call.grad_entropy[step.at(i)] = static_cast<T>(bonus);
    }
  }
  if (step.lane == 0) {
    sums.z += totals.z;
    sums.steps += 1;
    sums.tokens += n;
    sums.entropy += weight * totals.entropy / n;
  }
  return log_ratio;
}

}  // namespace steppo::cuda
