// The policy loss of one step on the CPU, whatever way its tokens are found. The layout form
// (policy_loss.cpp) and the mask form (policy_loss_masked.cpp) put steps together.
#pragma once

#include <cmath>

#include "lanes.h"
#include "policy_tokens.h"
#include "steppo/policy_sums.h"

namespace steppo::cpu::STEPPO_ISA {

// Whether any lane of a mask is set.
template <class M>
static inline bool any_of(M mask) {
  std::int64_t words[sizeof mask / 8], any = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (const std::int64_t word : words) any |= word;
  return any != 0;
}

// e^d - 1 - d of |d| <= 1/16 to the last bits of the type: d^2 (1/2! + d/3! + d^2/4! + ...).
template <class T>
static inline Lanes<T> near_k3(Lanes<T> d) {
  constexpr double kFactors[] = {1 / 2.,    1 / 6.,     1 / 24.,     1 / 120.,     1 / 720.,
                                 1 / 5040., 1 / 40320., 1 / 362880., 1 / 3628800., 1 / 39916800.};
  constexpr int kTerms = sizeof(T) == sizeof(float) ? 4 : 10;
  Lanes<T> sum = Lanes<T>{} + T(kFactors[kTerms - 1]);
#pragma GCC unroll 10
  for (int k = kTerms - 2; k >= 0; --k) sum = T(kFactors[k]) + d * sum;
  return d * d * sum;
}

// Returns the sum of z and adds e^z - 1 - z, for approx_kl_k3, to `k3`. Policies move little
// between updates, and then a short series is enough for the second; a block of tokens where one
// moved far is summed again. Lanes without a token hold z = 0, which adds nothing to either.
template <class T, class At>
static inline double sum_log_ratios(const T* now, const T* old, At at, int64_t length, Sum<T>& k3) {
  constexpr int64_t kTokens = 256;
  Sum<T> z;
  for (int64_t begin = 0; begin < length; begin += kTokens) {
    const int64_t end = begin + kTokens < length ? begin + kTokens : length;
    Lanes<T> series{}, largest{};
    for (int64_t i = begin; i < end; i += kLanes<T>) {
      const Lanes<T> d = load(now, at, i, length) - load(old, at, i, length);
      const Lanes<T> square = d * d;
      z.add(d);
      series += near_k3<T>(d);
      // A NaN may get lost here; it is in the series.
      largest = Arithmetic<Lanes<T>>::select(square <= largest, largest, square);
    }
    // What is not within +-1/16; a NaN is not.
    if (any_of(~(largest <= 0.00390625f))) {
      for (int64_t i = begin; i < end; i += kLanes<T>) {
        k3.add(kl_penalty<kK3>(load(now, at, i, length) - load(old, at, i, length)).value);
      }
    } else {
      k3.add(series);
    }
  }
  return z.total();
}

// Whether every token of a step has the advantage of its first one.
template <class T, class At>
static inline bool share_one(const T* values, At at, int64_t length) {
  const T first = values[at(0)];
  if (length < kLanes<T>) {
    for (int64_t i = 1; i < length; ++i) {
      if (values[at(i)] != first) return false;
    }
    return true;
  }
  MaskOf<Lanes<T>> apart{};
  for (int64_t i = 0; i < length - kLanes<T>; i += kLanes<T>) {
    apart |= load(values, at, i, length) != first;
  }
  // The last vector looks at some a second time.
  apart |= load(values, at, length - kLanes<T>, length) != first;
  return !any_of(apart);
}

// A non-empty step.
struct PolicyStep {
  int64_t index;  // of what is given per step
  int64_t length;
  double weight;  // w_s
};

// The policy part of a step: its gradient and value, and what the metrics count. Written where
// every token has the slope of the step.
template <class T, class At>
static inline int64_t add_shared(const PolicyCall<T>& call, At at, const PolicyStep& step,
                                 const Point<double>& point, double scale, PolicySums& sums) {
  const PolicyConfig& config = call.config;
  const double n = static_cast<double>(step.length);
  const Unit<double> unit = step_unit(point, config);
  double is_weight = 1;
  if (call.is_weights != nullptr) {
    is_weight = call.is_weights_per_token ? sum_tokens(call.is_weights, at, step.length) / n
                                          : static_cast<double>(call.is_weights[step.index]);
  }
  sums.policy += step.weight * unit.value * is_weight;
  add_ratio(sums, point.ratio);
  if (unit.is_clipped) {
    (point.ratio < 1 ? sums.clipped_low : sums.clipped_high) += 1;
    sums.clipped_tokens += n;
  }

  // d total / d log pi of every token, before its own weight and the KL part. What is 0 stays 0,
  // whatever the weights are.
  const double share = step.weight / call.total;
  double slope = unit.slope == 0 ? 0.0 : share * unit.slope * scale;
  const bool weigh_tokens = call.is_weights_per_token && slope != 0;
  if (!weigh_tokens && slope != 0) slope *= is_weight;
  const SharedSlope<T> policy{static_cast<T>(slope)};
  if (call.ref_log_probs == nullptr && !weigh_tokens) {
    if (call.grad_log_probs != nullptr) {
      for (int64_t i = 0; i < step.length; ++i) call.grad_log_probs[at(i)] = policy.slope;
    }
    return policy.slope == T(0) ? step.length : 0;
  }
  const T* const weights = weigh_tokens ? call.is_weights : nullptr;
  const auto run = [&](const auto& penalty) {
    return differentiate(call, policy, penalty, at, step.length, T(1), weights, share / n);
  };
  const TokenSums<T> sum = config.kl_estimator == kK1   ? run(Penalty<kK1>{})
                           : config.kl_estimator == kK2 ? run(Penalty<kK2>{})
                                                        : run(Penalty<kK3>{});
  sums.kl += step.weight * sum.kl / n;
  return sum.dead;
}

// The same where tokens have advantages, ratios or clips of their own.
template <class Policy, class T, class At>
static inline int64_t add_own(const PolicyCall<T>& call, const Policy& policy, At at,
                              const PolicyStep& step, double scale, PolicySums& sums) {
  const double n = static_cast<double>(step.length);
  const double share = step.weight / call.total;
  const bool by_token = call.is_weights_per_token;
  const double is_weight =
      call.is_weights != nullptr && !by_token ? call.is_weights[step.index] : 1.0;
  const AnyPenalty penalty{call.config.kl_estimator};
  const T factor = static_cast<T>(share * scale * is_weight);
  const T* const weights = by_token ? call.is_weights : nullptr;
  const TokenSums<T> sum =
      differentiate(call, policy, penalty, at, step.length, factor, weights, share / n);
  sums.policy += step.weight * (sum.value / n) * is_weight;
  sums.kl += step.weight * sum.kl / n;
  sums.clipped_low += sum.clipped_low / n;
  sums.clipped_high += sum.clipped_high / n;
  sums.clipped_tokens += sum.clipped_low + sum.clipped_high;
  if constexpr (Policy::kHasRatios) {
    sums.ratio += sum.ratio.total() / n;
    sums.ratio_min = lesser(sums.ratio_min, sum.ratio.lowest());
    sums.ratio_max = greater(sums.ratio_max, sum.ratio.largest());
  } else {
    add_ratio(sums, policy.ratio);
  }
  return sum.dead;
}

// Adds one non-empty step to `sums` and `k3`, the sum of a task that is added to its `sums` last,
// and writes the gradients of its tokens. Returns log rho.
template <class T, class At>
static inline double add_step(const PolicyCall<T>& call, At at, const PolicyStep& step,
                              PolicySums& sums, Sum<T>& k3) {
  const PolicyConfig& config = call.config;
  const int64_t length = step.length;
  const double n = static_cast<double>(length);
  const double scale = ratio_scale(config.ratio, n);
  const bool is_own = call.advantages_per_token && !share_one(call.advantages, at, length);
  const T advantage = call.advantages[call.advantages_per_token ? at(0) : step.index];
  const double low = call.clip_low == nullptr ? config.clip_low : call.clip_low[step.index];
  const double high = call.clip_high == nullptr ? config.clip_high : call.clip_high[step.index];

  const double z = sum_log_ratios(call.log_probs, call.old_log_probs, at, length, k3);
  const Advantages<T, At> advantages{is_own ? call.advantages : nullptr, advantage, at, length};
  const double pooled = call.clips_tokens ? sum_held(call, advantages, at, length) : z;
  const double log_ratio = call.center + scale * (pooled - call.center * n);

  int64_t dead = 0;
  if (config.ratio == kToken) {
    dead = with_surrogate(config.surrogate, [&](auto kind) {
      const OwnRatios<decltype(kind)::value, T, At> policy{call, advantages, at, length, low, high};
      return add_own(call, policy, at, step, scale, sums);
    });
  } else {
    Point<double> point{log_ratio, ratio_of(log_ratio, config.log_ratio_max), advantage, low, high,
                        0.0};
    if (is_own || call.clips_tokens) {
      dead = add_own(call, OwnAdvantages<T, At>(call, advantages, at, length, point), at, step,
                     scale, sums);
    } else {
      dead = add_shared(call, at, step, point, scale, sums);
    }
  }
  sums.z += z;
  sums.steps += 1;
  sums.tokens += n;
  if (call.entropy != nullptr) {
    const double share = step.weight / call.total;
    const double bonus = config.entropy_coef == 0 ? 0.0 : -config.entropy_coef * share / n;
    sums.entropy += step.weight * sum_tokens(call.entropy, at, length) / n;
    if (bonus != 0) dead = 0;
    if (call.grad_entropy != nullptr) {
      for (int64_t i = 0; i < length; ++i) call.grad_entropy[at(i)] = static_cast<T>(bonus);
    }
  }
  sums.dead += static_cast<double>(dead);
  return log_ratio;
}

// How much more than one of a plain step a token costs.
static inline int64_t token_cost(const PolicyConfig& config) {
  return config.ratio == kToken ? 4 : 1;
}

// How many steps ahead tokens are asked for.
constexpr int64_t kStepsAhead = 6;

// Asks for the tokens of a step that comes later. Steps are short and lie apart, so that no
// processor sees where the next one is. GCC drops calls of a function that only asks for memory.
template <class T>
STEPPO_FN void fetch(const PolicyCall<T>& call, int64_t start, int64_t length) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  // A long step is seen after a few lines.
  constexpr int64_t kMost = 16 * kLine;
  const int64_t end = start + (length < kMost ? length : kMost);
  for (int64_t i = start; i < end; i += kLine) {
    __builtin_prefetch(call.log_probs + i);
    __builtin_prefetch(call.old_log_probs + i);
  }
  if (!call.advantages_per_token) return;
  for (int64_t i = start; i < end; i += kLine) __builtin_prefetch(call.advantages + i);
}

// Below this many bytes, memory is mostly used again from call to call, and has its pages.
constexpr int64_t kFreshBytes = int64_t{8} << 20;

// Prepares the outputs of a call for being written.
template <class T>
static inline void prepare(const PolicyCall<T>& call, int64_t num_tokens) {
  const int64_t bytes = num_tokens * static_cast<int64_t>(sizeof(T));
  if (bytes < kFreshBytes) return;
  if (call.grad_log_probs != nullptr) prefer_huge_pages(call.grad_log_probs, bytes);
  if (call.grad_entropy != nullptr) prefer_huge_pages(call.grad_entropy, bytes);
}

// Zeroes the gradients of tokens [first, last), which are no action's.
template <class T>
static inline void clear(const PolicyCall<T>& call, int64_t first, int64_t last) {
  if (call.grad_log_probs != nullptr) fill(call.grad_log_probs, first, last, T(0));
  if (call.grad_entropy != nullptr) fill(call.grad_entropy, first, last, T(0));
}

}  // namespace steppo::cpu::STEPPO_ISA
