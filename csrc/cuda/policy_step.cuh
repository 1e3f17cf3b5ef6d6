// The policy loss of one step by some lanes of a warp, or by a block: see csrc/cpu/policy_loss.h
// for the same on a CPU. Gradients lack the factor 1 / normalizer, which is known when every step
// has been seen.
#pragma once

#include "block_merge.cuh"
#include "scan.cuh"
#include "steppo/policy_arrays.h"
#include "steppo/policy_sums.h"

namespace steppo::cuda {

// A step in one piece, and the lane of those that share it.
struct PolicyRun {
  static constexpr std::int64_t index = 0;
  std::int64_t length, start;
  int lane;

  STEPPO_MEMBER std::int64_t at(std::int64_t i) const { return start + i; }
};

// The same, of a layout: in one piece from `start`, or listed. `advantage` is that of the step,
// where tokens have none of their own.
template <class T>
struct PolicyStep {
  std::int64_t index, length, start;
  const std::int64_t* listed;
  int lane;
  T advantage;

  STEPPO_MEMBER std::int64_t at(std::int64_t i) const { return start >= 0 ? start + i : listed[i]; }
};

// Tokens of a step that a lane loads before it uses the first of them, so that it waits once. There
// are registers for so many.
template <class T, int lanes>
constexpr int kTokensTogether = sizeof(T) > 4 ? 1
                                : lanes == 1  ? 2
                                              : 4;

// Calls use(t, load(t)) for the tokens of a lane, in their order.
template <int lanes, int together, class Step, class Load, class Use>
STEPPO_DEVICE void for_tokens(const Step& step, Load&& load, Use&& use) {
  for (std::int64_t i = step.lane; i < step.length; i += lanes * together) {
    std::int64_t tokens[together];
    decltype(load(std::int64_t{})) loaded[together]{};
#pragma unroll
    for (int k = 0; k < together; ++k) {
      const std::int64_t at = i + k * lanes;
      tokens[k] = at < step.length ? step.at(at) : -1;
    }
#pragma unroll
    for (int k = 0; k < together; ++k) {
      if (tokens[k] >= 0) loaded[k] = load(tokens[k]);
    }
#pragma unroll
    for (int k = 0; k < together; ++k) {
      if (tokens[k] >= 0) use(tokens[k], loaded[k]);
    }
  }
}

// What a token has for itself; what there is not, or nobody asks for, is not loaded.
template <class T>
struct PolicyToken {
  T now, old, advantage, weight, entropy, reference;
};

// The advantage of a step that is not empty, or that of its first token.
template <class T>
STEPPO_DEVICE T first_advantage(const PolicyArrays<T>& call, const PolicyRun& step) {
  return call.advantages[step.at(0)];
}

template <class T>
STEPPO_DEVICE T first_advantage(const PolicyArrays<T>& call, const PolicyStep<T>& step) {
  return call.advantages_per_token ? call.advantages[step.at(0)] : step.advantage;
}

// What the ratio of a token, and what is multiplied with it, are made of. `of_step` is the
// advantage where tokens have none of their own.
template <class T>
STEPPO_DEVICE PolicyToken<T> ratio_token(const PolicyArrays<T>& call, std::int64_t t, T of_step) {
  PolicyToken<T> token{};
  token.now = call.log_probs[t];
  token.old = call.old_log_probs[t];
  token.advantage = call.advantages_per_token ? call.advantages[t] : of_step;
  if (call.is_weights_per_token) token.weight = call.is_weights[t];
  return token;
}

// Asks for the memory of what the ratios of a token, and of its neighbours behind it, are made of.
template <class T>
STEPPO_DEVICE void prefetch_token(const PolicyArrays<T>& call, std::int64_t t) {
  prefetch(call.log_probs + t);
  prefetch(call.old_log_probs + t);
  if (call.advantages_per_token) prefetch(call.advantages + t);
}

// The sum over the threads that share a step: lanes of a warp, or all threads of a block.
template <int lanes>
STEPPO_DEVICE double sum_of_sharers(double value) {
  if constexpr (lanes <= kWarp) {
    return sum_of_lanes<lanes>(value);
  } else {
    return join_block<lanes, Sum>(value, 0.0);
  }
}

// What a first look at the tokens of a step adds up.
struct TokenTotals {
  double z = 0, held = 0, weights = 0, entropy = 0, k3 = 0;
  // Tokens whose advantage is not that of the first one.
  double apart = 0;
};

template <int lanes, class T, class Step>
STEPPO_DEVICE TokenTotals look_at(const PolicyArrays<T>& call, const Step& step,
                                  const PolicyConfig& config) {
  TokenTotals totals;
  const bool holds = clips_tokens(config);
  const bool varies = call.advantages_per_token;
  // What is not loaded at once is on its way while that is waited for.
  constexpr int kOfLine = kBytesOfLine / sizeof(T);
  const std::int64_t behind = lanes * kTokensTogether<T, lanes> + step.lane * kOfLine;
  if (step.start >= 0 && behind < step.length) prefetch_token(call, step.start + behind);
  const T first = step.length == 0 ? T(0) : first_advantage(call, step);
  for_tokens<lanes, kTokensTogether<T, lanes>>(
      step,
      [&](std::int64_t t) {
        PolicyToken<T> token = ratio_token(call, t, first);
        if (call.entropy != nullptr) token.entropy = call.entropy[t];
        return token;
      },
      [&](std::int64_t, const PolicyToken<T>& token) {
        const T z = token.now - token.old;
        totals.z += static_cast<double>(z);
        totals.k3 += static_cast<double>(kl_penalty<kK3>(z).value);
        if (varies) totals.apart += token.advantage != first;
        if (holds) totals.held += static_cast<double>(held_log_ratio(z, token.advantage, config));
        if (call.is_weights_per_token) totals.weights += static_cast<double>(token.weight);
        if (call.entropy != nullptr) totals.entropy += static_cast<double>(token.entropy);
      });
  totals.z = sum_of_sharers<lanes>(totals.z);
  if (varies) totals.apart = sum_of_sharers<lanes>(totals.apart);
  if (holds) totals.held = sum_of_sharers<lanes>(totals.held);
  if (call.is_weights_per_token) totals.weights = sum_of_sharers<lanes>(totals.weights);
  if (call.entropy != nullptr) totals.entropy = sum_of_sharers<lanes>(totals.entropy);
  return totals;
}

// The factors of a step: its weight w_s, the share of it that a token has, and L^-p.
struct StepFactors {
  double weight, share, scale;
};

// The KL penalty of tokens with a factor. A penalty that is only reported has no gradient, whatever
// its slope is.
template <class T>
struct Penalties {
  const PolicyConfig& config;
  double share;
  double sum = 0;

  STEPPO_MEMBER void load(const PolicyArrays<T>& call, std::int64_t t, PolicyToken<T>& token) {
    if (call.ref_log_probs == nullptr) return;
    token.now = call.log_probs[t];
    token.reference = call.ref_log_probs[t];
  }

  // Adds the penalty of a token, and returns what its gradient gets.
  STEPPO_MEMBER T add(const PolicyArrays<T>& call, const PolicyToken<T>& token) {
    if (call.ref_log_probs == nullptr) return T(0);
    const KL<T> found = penalty_of(config.kl_estimator, token.reference - token.now);
    sum += share * static_cast<double>(found.value);
    const T coefficient = static_cast<T>(config.kl_coef * share);
    return coefficient == T(0) ? T(0) : coefficient * found.slope;
  }
};

// Tokens that share the slope of their step.
template <int lanes, class T, class Step>
STEPPO_DEVICE void take_together(const PolicyArrays<T>& call, const Step& step,
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
  Penalties<T> penalties{config, factors.share};
  int dead = 0;
  for_tokens<lanes, kTokensTogether<T, lanes>>(
      step,
      [&](std::int64_t t) {
        PolicyToken<T> token{};
        if (weighs_tokens) token.weight = call.is_weights[t];
        penalties.load(call, t, token);
        return token;
      },
      [&](std::int64_t t, const PolicyToken<T>& token) {
        T grad = static_cast<T>(slope);
        if (weighs_tokens) grad *= token.weight;
        grad += penalties.add(call, token);
        dead += !is_alive && grad == T(0);
        if (call.grad_log_probs != nullptr) call.grad_log_probs[t] = grad;
      });
  sums.kl += penalties.sum;
  sums.dead += dead;
}

// Tokens with advantages, ratios or clips of their own. `unit_of(token)` is what the policy part
// gives.
template <int lanes, class T, class Step, class UnitOf>
STEPPO_DEVICE void take_apart(const PolicyArrays<T>& call, const Step& step,
                              const PolicyConfig& config, const StepFactors& factors,
                              bool has_ratios, bool is_alive, PolicySums& sums, UnitOf&& unit_of) {
  const double n = static_cast<double>(step.length), share = factors.share;
  const T first = first_advantage(call, step);
  const bool by_token = call.is_weights_per_token;
  const double is_weight = call.is_weights != nullptr && !by_token
                               ? static_cast<double>(call.is_weights[step.index])
                               : 1.0;
  const T factor = static_cast<T>(factors.weight * factors.scale * is_weight);
  Penalties<T> penalties{config, share};
  double policy = 0, ratios = 0;
  int clipped_low = 0, clipped_high = 0, dead = 0;
  for_tokens<lanes, kTokensTogether<T, lanes>>(
      step,
      [&](std::int64_t t) {
        PolicyToken<T> token = ratio_token(call, t, first);
        penalties.load(call, t, token);
        return token;
      },
      [&](std::int64_t t, const PolicyToken<T>& token) {
        const TokenUnit<T> unit = unit_of(token);
        T grad = unit.slope == T(0) ? T(0) : unit.slope * factor, value = unit.value;
        if (by_token) {
          grad = grad == T(0) ? T(0) : grad * token.weight;
          value *= token.weight;
        }
        policy += static_cast<double>(value);
        clipped_low += unit.clipped_low != T(0);
        clipped_high += unit.clipped_high != T(0);
        if (has_ratios) {
          const double ratio = static_cast<double>(unit.ratio);
          ratios += ratio;
          sums.ratio_min = lesser(sums.ratio_min, ratio);
          sums.ratio_max = greater(sums.ratio_max, ratio);
        }
        grad += penalties.add(call, token);
        dead += !is_alive && grad == T(0);
        if (call.grad_log_probs != nullptr) call.grad_log_probs[t] = grad;
      });
  sums.policy += share * policy * is_weight;
  sums.kl += penalties.sum;
  sums.ratio += ratios / n;
  sums.clipped_low += clipped_low / n;
  sums.clipped_high += clipped_high / n;
  sums.clipped_tokens += clipped_low + clipped_high;
  sums.dead += dead;
}

// Adds a step to the sums of its lanes, which lie in shared memory, and writes the gradients of its
// tokens. All lanes of a warp call it together, with a step or an empty one; all threads of a block
// that share one, with that. Returns log rho.
// `by_token` is the ratio of single tokens.
template <int lanes, bool by_token, class T, class Step>
STEPPO_DEVICE double add_step(const PolicyArrays<T>& call, const Step& step,
                              const PolicyConfig& config, double weight, double center,
                              PolicySums& all) {
  const TokenTotals totals = look_at<lanes>(call, step, config);
  if (step.length == 0) return 0;
  PolicySums sums;
  sums.k3 = totals.k3;
  const double n = static_cast<double>(step.length);
  const StepFactors factors{weight, weight * (1.0 / n), ratio_scale(config.ratio, n)};
  const bool holds = clips_tokens(config), is_apart = totals.apart > 0;
  const double pooled = holds ? totals.held : totals.z;
  const double log_ratio = center + factors.scale * (pooled - center * n);
  const double low =
      call.clip_low == nullptr ? config.clip_low : static_cast<double>(call.clip_low[step.index]);
  const double high = call.clip_high == nullptr ? config.clip_high
                                                : static_cast<double>(call.clip_high[step.index]);
  const double bonus = config.entropy_coef == 0 ? 0.0 : -config.entropy_coef * factors.share;
  const bool is_alive = call.entropy != nullptr && bonus != 0;
  if constexpr (by_token) {
    with_surrogate(config.surrogate, [&](auto kind) {
      const auto unit_of = [&](const PolicyToken<T>& token) {
        return token_by_itself<decltype(kind)::value>(token.now, token.old, token.advantage,
                                                      static_cast<T>(low), static_cast<T>(high),
                                                      config);
      };
      take_apart<lanes>(call, step, config, factors, true, is_alive, sums, unit_of);
      return 0;
    });
  } else {
    const double advantage = static_cast<double>(first_advantage(call, step));
    const Point<double> point{
        log_ratio, ratio_of(log_ratio, config.log_ratio_max), advantage, low, high, 0.0};
    if (is_apart || holds) {
      const SignedUnits units = signed_units(point, config);
      if (step.lane == 0) add_ratio(sums, point.ratio);
      const auto unit_of = [&](const PolicyToken<T>& token) {
        return token_of_step(token.advantage, token.now - token.old, holds, units, config);
      };
      take_apart<lanes>(call, step, config, factors, false, is_alive, sums, unit_of);
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
    sums.entropy += factors.share * totals.entropy;
  }
  merge_into(all, sums);
  return log_ratio;
}

}  // namespace steppo::cuda
