// The tokens of a step in the policy loss: what each of them gets of the policy part and of the KL
// penalty.
//
// A policy part is a type: `kHasRatios` says whether tokens have ratios of their own, and a call
// with the place of the first of some tokens returns their lanes.
#pragma once

#include "lanes.h"
#include "steppo/policy_arrays.h"

namespace steppo::cpu::STEPPO_ISA {

template <class T>
struct PolicyCall : PolicyArrays<T> {
  PolicyConfig config;
  bool clips_tokens;
  double center = 0;  // mu of the centered ratio
  double total = 1;   // the normalizer

  PolicyCall(const PolicyTensors& tensors, const PolicyConfig& numbers)
      : PolicyArrays<T>(arrays_of<T>(tensors)),
        config(numbers),
        clips_tokens(steppo::clips_tokens(numbers)) {}
};

template <class T, class At>
static inline double sum_tokens(const T* values, At at, int64_t length) {
  Sum<T> sum;
  for (int64_t i = 0; i < length; i += kLanes<T>) sum.add(load(values, at, i, length));
  return sum.total();
}

// The advantages of a step: of each token, or one for all.
template <class T, class At>
struct Advantages {
  const T* own;  // null: `shared`
  T shared;
  At at;
  int64_t length;

  Lanes<T> operator()(int64_t i) const {
    return own != nullptr ? load(own, at, i, length) : Lanes<T>{} + shared;
  }
};

// The sum of the clamped z of a step.
template <class T, class At>
static inline double sum_held(const PolicyCall<T>& call, const Advantages<T, At>& advantages, At at,
                              int64_t length) {
  Sum<T> sum;
  for (int64_t i = 0; i < length; i += kLanes<T>) {
    const Lanes<T> z =
        load(call.log_probs, at, i, length) - load(call.old_log_probs, at, i, length);
    sum.add(held_log_ratio(z, advantages(i), call.config));
  }
  return sum.total();
}

// Every token has the slope of its step.
template <class T>
struct SharedSlope {
  static constexpr bool kHasRatios = false;
  static constexpr bool kIsCounted = false;
  T slope;

  TokenUnit<Lanes<T>> operator()(int64_t) const {
    return {Lanes<T>{} + slope, Lanes<T>{}, Lanes<T>{}, Lanes<T>{}, Lanes<T>{}};
  }
};

// The ratio is that of the step; the advantages are the tokens' own, or tokens are clamped. Value
// and slope are multiples of |A|, so that a step decides both signs once, in fp64.
template <class T, class At>
struct OwnAdvantages {
  static constexpr bool kHasRatios = false;
  static constexpr bool kIsCounted = true;
  const PolicyCall<T>& call;
  Advantages<T, At> advantages;
  At at;
  int64_t length;
  SignedUnits units;
  double ratio;

  OwnAdvantages(const PolicyCall<T>& the_call, const Advantages<T, At>& of_step, At where,
                int64_t count, const Point<double>& point)
      : call(the_call),
        advantages(of_step),
        at(where),
        length(count),
        units(signed_units(point, the_call.config)),
        ratio(point.ratio) {}

  TokenUnit<Lanes<T>> operator()(int64_t i) const {
    Lanes<T> z{};
    if (call.clips_tokens) {
      z = load(call.log_probs, at, i, length) - load(call.old_log_probs, at, i, length);
    }
    return token_of_step(advantages(i), z, call.clips_tokens, units, call.config);
  }
};

// Every token has its own ratio.
template <Surrogate kKind, class T, class At>
struct OwnRatios {
  static constexpr bool kHasRatios = true;
  static constexpr bool kIsCounted = true;
  const PolicyCall<T>& call;
  Advantages<T, At> advantages;
  At at;
  int64_t length;
  double low, high;

  TokenUnit<Lanes<T>> operator()(int64_t i) const {
    using L = Lanes<T>;
    return token_by_itself<kKind>(load(call.log_probs, at, i, length),
                                  load(call.old_log_probs, at, i, length), advantages(i),
                                  all_of<L>(low), all_of<L>(high), call.config);
  }
};

// The KL penalty of some tokens: of one estimator, or of one that is chosen as it runs.
template <KLEstimator kKind>
struct Penalty {
  template <class L>
  KL<L> operator()(L d) const {
    return kl_penalty<kKind>(d);
  }
};
struct AnyPenalty {
  KLEstimator kind;

  template <class L>
  KL<L> operator()(L d) const {
    return penalty_of(kind, d);
  }
};

// Sums over the tokens of a step. `value` is weighed by the tokens' own weights.
template <class T>
struct TokenSums {
  double value = 0, kl = 0, clipped_low = 0, clipped_high = 0;
  Extremes<T> ratio;
  int64_t dead = 0;
};

// Writes the gradient of every token: `factor` and its own of `weights` times the slope of the
// policy part, plus the KL part, whose coefficient is `kl_coef` times `kl_share`. A KL that is only
// reported has no gradient, whatever its slope is. Counts the tokens left with a gradient of
// exactly 0.
template <class Policy, class KLPenalty, class T, class At>
static inline TokenSums<T> differentiate(const PolicyCall<T>& call, const Policy& policy,
                                         const KLPenalty& penalty, At at, int64_t length, T factor,
                                         const T* weights, double kl_share) {
  using L = Lanes<T>;
  using Choose = Arithmetic<L>;
  const PolicyConfig& config = call.config;
  const bool has_kl = call.ref_log_probs != nullptr;
  const T kl_coefficient =
      !has_kl || config.kl_coef == 0 ? T(0) : static_cast<T>(config.kl_coef * kl_share);
  Sum<T> value, kl;
  Count<T> clipped_low, clipped_high, dead;
  TokenSums<T> sums;
  for (int64_t i = 0; i < length; i += kLanes<T>) {
    const TokenUnit<L> token = policy(i);
    L grad = token.slope, own_value = token.value;
    if constexpr (Policy::kIsCounted) {
      grad = Choose::select(grad == L{}, L{}, grad * factor);
    }
    if (weights != nullptr) {
      const L own = load(weights, at, i, length);
      if constexpr (Policy::kIsCounted) {
        grad = Choose::select(grad == L{}, L{}, grad * own);
        own_value *= own;
      } else {
        grad *= own;
      }
    }
    const L present = token_lanes<T>(length - i);
    if constexpr (Policy::kIsCounted) {
      value.add(Choose::select(present > T(0), own_value, L{}));
      clipped_low.add(token.clipped_low * present);
      clipped_high.add(token.clipped_high * present);
      if constexpr (Policy::kHasRatios) sums.ratio.add(token.ratio, present);
    }
    if (has_kl) {
      const L d = load(call.ref_log_probs, at, i, length) - load(call.log_probs, at, i, length);
      const KL<L> found = penalty(d);
      kl.add(found.value);
      if (kl_coefficient != T(0)) grad += kl_coefficient * found.slope;
    }
    dead.add(Choose::select(grad == L{}, present, L{}));
    if (call.grad_log_probs != nullptr) store(call.grad_log_probs, at, i, length, grad);
  }
  sums.value = value.total();
  sums.kl = kl.total();
  sums.clipped_low = clipped_low.total();
  sums.clipped_high = clipped_high.total();
  sums.dead = static_cast<int64_t>(dead.total());
  return sums;
}

}  // namespace steppo::cpu::STEPPO_ISA
