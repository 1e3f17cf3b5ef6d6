// The tokens of a step in the policy loss: what each of them gets of the policy part and of the KL
// penalty.
//
// A policy part is a type: `kHasRatios` says whether tokens have ratios of their own, and a call
// with the place of the first of some tokens returns their lanes.
#pragma once

#include <limits>

#include "lanes.h"
#include "steppo/surrogates.h"

namespace steppo::cpu::STEPPO_ISA {

// A call on pointers to numbers of type T; optional ones are null.
template <class T>
struct PolicyCall {
  const T* log_probs;
  const T* old_log_probs;
  const T* advantages;
  const T* ref_log_probs;
  const T* entropy;
  const T* is_weights;
  const T* step_weights;
  const T* clip_low;
  const T* clip_high;
  bool advantages_per_token;
  bool is_weights_per_token;
  T* grad_log_probs;
  T* grad_entropy;
  PolicyConfig config;
  bool clips_tokens;
  double center = 0;  // mu of the centered ratio
  double total = 1;   // the normalizer

  // On-policy, the old log-probs are the new ones: what is not finite gives NaN, as everywhere.
  PolicyCall(const PolicyTensors& x, const PolicyConfig& numbers)
      : log_probs(static_cast<const T*>(x.log_probs)),
        old_log_probs(
            static_cast<const T*>(x.old_log_probs != nullptr ? x.old_log_probs : x.log_probs)),
        advantages(static_cast<const T*>(x.advantages)),
        ref_log_probs(static_cast<const T*>(x.ref_log_probs)),
        entropy(static_cast<const T*>(x.entropy)),
        is_weights(static_cast<const T*>(x.is_weights)),
        step_weights(static_cast<const T*>(x.step_weights)),
        clip_low(static_cast<const T*>(x.clip_low)),
        clip_high(static_cast<const T*>(x.clip_high)),
        advantages_per_token(x.advantages_per_token),
        is_weights_per_token(x.is_weights_per_token),
        grad_log_probs(static_cast<T*>(x.grad_log_probs)),
        grad_entropy(static_cast<T*>(x.grad_entropy)),
        config(numbers),
        clips_tokens(numbers.token_clip_low < std::numeric_limits<double>::infinity() ||
                     numbers.token_clip_high < std::numeric_limits<double>::infinity()) {}
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

// z of some tokens, clamped on the side of the advantage.
template <class L>
static inline L held_log_ratio(L z, L advantage, const PolicyConfig& config) {
  using Choose = Arithmetic<L>;
  const L low = -all_of<L>(config.token_clip_low), high = all_of<L>(config.token_clip_high);
  return Choose::select(advantage < L{}, Choose::select(z < low, low, z),
                        Choose::select(z > high, high, z));
}

// z of one token in fp64, as it is pooled: clamped if tokens are. `owner` is where its advantage
// is.
template <class T>
static inline double pooled_log_ratio(const PolicyCall<T>& call, int64_t token, int64_t owner) {
  const double z =
      static_cast<double>(call.log_probs[token]) - static_cast<double>(call.old_log_probs[token]);
  if (!call.clips_tokens) return z;
  return held_log_ratio<double>(z, call.advantages[owner], call.config);
}

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

// What the policy part gives to some tokens: the slope and the value of each, 1 where it is
// clipped, below and above a ratio of 1, and its ratio.
template <class T>
struct TokenLanes {
  Lanes<T> slope, value, clipped_low, clipped_high, ratio;
};

// Every token has the slope of its step.
template <class T>
struct SharedSlope {
  static constexpr bool kHasRatios = false;
  static constexpr bool kIsCounted = false;
  T slope;

  TokenLanes<T> operator()(int64_t) const {
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
  double ratio;
  Unit<double> positive, negative;

  OwnAdvantages(const PolicyCall<T>& the_call, const Advantages<T, At>& of_step, At where,
                int64_t count, Point<double> point)
      : call(the_call), advantages(of_step), at(where), length(count), ratio(point.ratio) {
    point.advantage = 1.0;
    positive = step_unit(point, call.config);
    point.advantage = -1.0;
    negative = step_unit(point, call.config);
  }

  TokenLanes<T> operator()(int64_t i) const {
    using L = Lanes<T>;
    using Choose = Arithmetic<L>;
    const L a = advantages(i);
    const auto is_negative = a < L{}, is_zero = a == L{};
    const L size = Choose::select(is_negative, -a, a);
    const auto signed_part = [&](double of_positive, double of_negative) {
      return Choose::select(is_negative, all_of<L>(of_negative), all_of<L>(of_positive));
    };
    L slope = signed_part(positive.slope, negative.slope);
    slope = Choose::select(is_zero | (slope == L{}), L{}, size * slope);
    if (call.clips_tokens) {
      const L z = load(call.log_probs, at, i, length) - load(call.old_log_probs, at, i, length);
      const auto is_held = held_log_ratio(z, a, call.config) != z;
      // What is not there was not clamped.
      slope = Choose::select(is_held & (z == z), L{}, slope);
    }
    // Without an advantage nothing tells the branches of a clip apart.
    const double zero_is_clipped = call.config.surrogate != kClip && positive.is_clipped;
    L clipped = signed_part(positive.is_clipped, negative.is_clipped);
    clipped = Choose::select(is_zero, all_of<L>(zero_is_clipped), clipped);
    clipped = Choose::select(a == a, clipped, L{});
    return {slope, size * signed_part(positive.value, negative.value), ratio < 1 ? clipped : L{},
            ratio < 1 ? L{} : clipped, L{}};
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

  TokenLanes<T> operator()(int64_t i) const {
    using L = Lanes<T>;
    using Choose = Arithmetic<L>;
    const PolicyConfig& config = call.config;
    const L now = load(call.log_probs, at, i, length),
            old = load(call.old_log_probs, at, i, length);
    const L z = now - old;
    Point<L> point{
        z, ratio_of(z, config.log_ratio_max), advantages(i), all_of<L>(low), all_of<L>(high), L{}};
    if constexpr (kKind == kTv) point.gap = Choose::exp(now) - Choose::exp(old);
    const Unit<L> unit = surrogate<kKind>(point, config);
    const L clipped = Choose::select(unit.is_clipped, all_of<L>(1.0), L{});
    const auto is_low = point.ratio < T(1);
    return {unit.slope, unit.value, Choose::select(is_low, clipped, L{}),
            Choose::select(is_low, L{}, clipped), point.ratio};
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
    return kind == kK1 ? kl_penalty<kK1>(d) : kind == kK2 ? kl_penalty<kK2>(d) : kl_penalty<kK3>(d);
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
    const TokenLanes<T> token = policy(i);
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
