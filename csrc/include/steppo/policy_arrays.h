// The tensors of the policy loss with numbers of a type, for any device.
#pragma once

#include "steppo/policy_tokens.h"

namespace steppo {

// Optional ones are null.
template <class T>
struct PolicyArrays {
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
  bool is_weights_per_token;  // false where there are none
  T* grad_log_probs;
  T* grad_entropy;
};

// On-policy, the old log-probs are the new ones: what is not finite gives NaN, as everywhere.
template <class T>
STEPPO_FN PolicyArrays<T> arrays_of(const PolicyTensors& x) {
  return {static_cast<const T*>(x.log_probs),
          static_cast<const T*>(x.old_log_probs != nullptr ? x.old_log_probs : x.log_probs),
          static_cast<const T*>(x.advantages),
          static_cast<const T*>(x.ref_log_probs),
          static_cast<const T*>(x.entropy),
          static_cast<const T*>(x.is_weights),
          static_cast<const T*>(x.step_weights),
          static_cast<const T*>(x.clip_low),
          static_cast<const T*>(x.clip_high),
          x.advantages_per_token,
          x.is_weights != nullptr && x.is_weights_per_token,
          static_cast<T*>(x.grad_log_probs),
          static_cast<T*>(x.grad_entropy)};
}

// z of one token in fp64, as it is pooled: clamped if tokens are. `owner` is where its advantage
// is.
template <class T>
STEPPO_FN double pooled_log_ratio(const PolicyArrays<T>& call, const PolicyConfig& config,
                                  bool is_held, std::int64_t token, std::int64_t owner) {
  const double z =
      static_cast<double>(call.log_probs[token]) - static_cast<double>(call.old_log_probs[token]);
  if (!is_held) return z;
  return held_log_ratio(z, static_cast<double>(call.advantages[owner]), config);
}

}  // namespace steppo
