// One step of the clipped objective on the CPU, whatever way its tokens are found. The layout form
// (policy_loss.cpp) and the mask form (policy_loss_masked.cpp) put steps together.
#pragma once

#include <cmath>
#include <limits>

#include "lanes.h"

namespace steppo::cpu::STEPPO_ISA {

// The inputs and outputs of a call; optional ones are null.
template <class T>
struct PolicyCall {
  const T* log_probs;
  const T* old_log_probs;
  const T* advantages;
  const T* ref_log_probs;
  const T* entropy;
  const T* is_weights;
  bool is_weights_per_token;
  T* grad_log_probs;
  T* grad_entropy;
  PolicyConfig config;
  double center = 0;  // mu of the centered ratio
  double total = 1;   // the normalizer
};

// A call on pointers to numbers of type T. On-policy, the old log-probs are the new ones: what is
// not finite gives NaN, as everywhere.
template <class T>
static inline PolicyCall<T> policy_call(const void* log_probs, const void* old_log_probs,
                                        const void* advantages, const void* ref_log_probs,
                                        const void* entropy, const void* is_weights,
                                        bool is_weights_per_token, void* grad_log_probs,
                                        void* grad_entropy, const PolicyConfig& config) {
  return {static_cast<const T*>(log_probs),
          static_cast<const T*>(old_log_probs != nullptr ? old_log_probs : log_probs),
          static_cast<const T*>(advantages),
          static_cast<const T*>(ref_log_probs),
          static_cast<const T*>(entropy),
          static_cast<const T*>(is_weights),
          is_weights_per_token,
          static_cast<T*>(grad_log_probs),
          static_cast<T*>(grad_entropy),
          config};
}

// Sums over the steps of a task, later over those of the call.
struct PolicySums {
  double policy = 0, kl = 0, entropy = 0;
  double ratio = 0;
  double ratio_min = std::numeric_limits<double>::infinity();
  double ratio_max = -std::numeric_limits<double>::infinity();
  double clipped_low = 0, clipped_high = 0, clipped_tokens = 0;
  double z = 0, k3 = 0, dead = 0;
  double steps = 0, tokens = 0;

  void add(const PolicySums& other) {
    policy += other.policy;
    kl += other.kl;
    entropy += other.entropy;
    ratio += other.ratio;
    ratio_min = lesser(ratio_min, other.ratio_min);
    ratio_max = greater(ratio_max, other.ratio_max);
    clipped_low += other.clipped_low;
    clipped_high += other.clipped_high;
    clipped_tokens += other.clipped_tokens;
    z += other.z;
    k3 += other.k3;
    dead += other.dead;
    steps += other.steps;
    tokens += other.tokens;
  }
};

template <class T, class At>
static inline double sum_tokens(const T* values, At at, int64_t length) {
  Sum<T> sum;
  for (int64_t i = 0; i < length; i += kLanes<T>) sum.add(load(values, at, i, length));
  return sum.total();
}

// Whether any lane is not within +-1/16: a NaN is not.
template <class L>
static inline bool any_beyond(L largest_square) {
  const auto beyond = ~(largest_square <= 0.00390625f);
  std::int64_t words[sizeof beyond / 8], any = 0;
  std::memcpy(words, &beyond, sizeof beyond);
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
    if (any_beyond(largest)) {
      for (int64_t i = begin; i < end; i += kLanes<T>) {
        k3.add(kl_penalty<kK3>(load(now, at, i, length) - load(old, at, i, length)).value);
      }
    } else {
      k3.add(series);
    }
  }
  return z.total();
}

// Writes the gradient of every token: `step_slope` times its own weight plus the KL part. Adds up
// the KL and counts the tokens left with a gradient of exactly 0.
template <bool has_kl, KLEstimator kind, class T, class At>
static inline void differentiate(const PolicyCall<T>& call, At at, int64_t length, T step_slope,
                                 bool weigh_tokens, T kl_coefficient, double* kl_sum,
                                 int64_t* zero_count) {
  Sum<T> kl;
  int64_t zeros = 0;
  for (int64_t i = 0; i < length; i += kLanes<T>) {
    Lanes<T> grad = Lanes<T>{} + step_slope;
    if (weigh_tokens) grad *= load(call.is_weights, at, i, length);
    if constexpr (has_kl) {
      const Lanes<T> d =
          load(call.ref_log_probs, at, i, length) - load(call.log_probs, at, i, length);
      const KL<Lanes<T>> penalty = kl_penalty<kind>(d);
      kl.add(penalty.value);
      // A penalty that only reports has no gradient, whatever its slope is.
      if (kl_coefficient != T(0)) grad += kl_coefficient * penalty.slope;
    }
    const int count = length - i >= kLanes<T> ? kLanes<T> : static_cast<int>(length - i);
    for (int k = 0; k < count; ++k) zeros += grad[k] == T(0);
    if (call.grad_log_probs != nullptr) store(call.grad_log_probs, at, i, length, grad);
  }
  *kl_sum = kl.total();
  *zero_count = zeros;
}

// Adds one non-empty step to `sums` and `k3`, the sum of a task that is added to its `sums` last,
// and writes the gradients of its tokens. `step` indexes per-step weights. Returns log rho.
template <class T, class At>
static inline double add_step(const PolicyCall<T>& call, At at, int64_t length, int64_t step,
                              double advantage, double weight, PolicySums& sums, Sum<T>& k3) {
  const PolicyConfig& config = call.config;
  const double n = static_cast<double>(length);
  const double scale = ratio_scale(config.ratio, n);
  const double z = sum_log_ratios(call.log_probs, call.old_log_probs, at, length, k3);
  const double log_ratio = call.center + scale * (z - call.center * n);
  const StepLoss loss = step_loss(log_ratio, advantage, config);

  double is_weight = 1;
  if (call.is_weights != nullptr) {
    is_weight = call.is_weights_per_token ? sum_tokens(call.is_weights, at, length) / n
                                          : static_cast<double>(call.is_weights[step]);
  }
  sums.policy += weight * loss.loss * is_weight;
  sums.ratio += loss.ratio;
  sums.ratio_min = lesser(sums.ratio_min, loss.ratio);
  sums.ratio_max = greater(sums.ratio_max, loss.ratio);
  sums.clipped_low += loss.is_clipped && advantage < 0;
  sums.clipped_high += loss.is_clipped && advantage > 0;
  sums.clipped_tokens += loss.is_clipped ? n : 0;
  sums.z += z;
  sums.steps += 1;
  sums.tokens += n;

  // d total / d log pi of every token, before its own weight and the KL part. What is 0 stays 0,
  // whatever the weights are.
  const bool has_kl = call.ref_log_probs != nullptr;
  const double share = weight / call.total;
  double slope = loss.slope == 0 ? 0.0 : share * loss.slope * scale;
  const bool weigh_tokens = call.is_weights != nullptr && call.is_weights_per_token && slope != 0;
  if (!weigh_tokens && slope != 0) slope *= is_weight;
  const T step_slope = static_cast<T>(slope);
  int64_t zeros = 0;
  if (!has_kl && !weigh_tokens) {
    zeros = step_slope == T(0) ? length : 0;
    if (call.grad_log_probs != nullptr) {
      for (int64_t i = 0; i < length; ++i) call.grad_log_probs[at(i)] = step_slope;
    }
  } else {
    double kl = 0;
    const auto run = !has_kl                      ? &differentiate<false, kK1, T, At>
                     : config.kl_estimator == kK1 ? &differentiate<true, kK1, T, At>
                     : config.kl_estimator == kK2 ? &differentiate<true, kK2, T, At>
                                                  : &differentiate<true, kK3, T, At>;
    const T kl_coefficient =
        config.kl_coef == 0 ? T(0) : static_cast<T>(config.kl_coef * share / n);
    run(call, at, length, step_slope, weigh_tokens, kl_coefficient, &kl, &zeros);
    sums.kl += weight * kl / n;
  }
  if (call.entropy != nullptr) {
    const double bonus = config.entropy_coef == 0 ? 0.0 : -config.entropy_coef * share / n;
    sums.entropy += weight * sum_tokens(call.entropy, at, length) / n;
    if (bonus != 0) zeros = 0;
    if (call.grad_entropy != nullptr) {
      for (int64_t i = 0; i < length; ++i) call.grad_entropy[at(i)] = static_cast<T>(bonus);
    }
  }
  sums.dead += static_cast<double>(zeros);
  return log_ratio;
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

// Turns the sums of a call into its loss and metrics. The gradients are final: their scale is 1.
template <class T>
static inline void finish(const PolicySums& sums, const PolicyConfig& config, double total,
                          void* loss, double* metrics, void* grad_scale) {
  const double steps = sums.steps > 0 ? sums.steps : 1, tokens = sums.tokens > 0 ? sums.tokens : 1;
  const bool empty = sums.steps == 0;
  metrics[kPolicyLoss] = sums.policy / total;
  metrics[kKLLoss] = sums.kl / total;
  metrics[kEntropy] = sums.entropy / total;
  metrics[kRatioMean] = empty ? 1.0 : sums.ratio / steps;
  metrics[kRatioMin] = empty ? 1.0 : sums.ratio_min;
  metrics[kRatioMax] = empty ? 1.0 : sums.ratio_max;
  metrics[kClipFraction] = (sums.clipped_low + sums.clipped_high) / steps;
  metrics[kClipFractionLow] = sums.clipped_low / steps;
  metrics[kClipFractionHigh] = sums.clipped_high / steps;
  metrics[kTokenClipFraction] = sums.clipped_tokens / tokens;
  metrics[kApproxKL] = -sums.z / tokens;
  metrics[kApproxKLK3] = sums.k3 / tokens;
  metrics[kDeadTokenFraction] = sums.dead / tokens;
  metrics[kNumSteps] = sums.steps;
  metrics[kNumTokens] = sums.tokens;
  *static_cast<T*>(loss) = static_cast<T>(metrics[kPolicyLoss] + config.kl_coef * metrics[kKLLoss] -
                                          config.entropy_coef * metrics[kEntropy]);
  *static_cast<T*>(grad_scale) = T(1);
}

}  // namespace steppo::cpu::STEPPO_ISA
