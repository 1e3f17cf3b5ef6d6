// Log-probs and entropies over kept sets from the logits of their pairs: see
// steppo_kernels/backends/kept_operators.py. A warp takes a token.
#include <limits>

#include "launch.h"
#include "softmax.cuh"
#include "steppo/cuda.h"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 256;

// The logits of a token's set, and how they are scaled. `place` is where among them the logit of
// the token itself is, -1 if it is elsewhere.
template <class T>
struct Set {
  const T* logits;
  std::int64_t first, count, place;
  double temperature;
};

template <class T>
STEPPO_DEVICE Set<T> set_of(const KeptRows& rows, const Sets& sets, std::int64_t i) {
  const std::int64_t token = rows.rows[i], first = sets.offsets[token];
  const double temperature = rows.temperatures != nullptr ? rows.temperatures[i] : rows.temperature;
  return {static_cast<const T*>(rows.logits) + first, first, sets.offsets[token + 1] - first,
          rows.places[i], temperature};
}

// The row of a warp. The lanes of one that has none leave together: they meet in sums.
STEPPO_DEVICE std::int64_t row_of_warp() {
  return (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
}

// The sums over a set but its token, whose logit is `target`, computed in a type. All lanes get
// them.
template <bool is_capped, class Value, class T>
STEPPO_DEVICE RowSums sum_set(const Set<T>& set, T target, const Cap<T>& cap) {
  constexpr Value kLeftOut = -std::numeric_limits<Value>::infinity();
  // Logits that a lane loads before it adds them up.
  constexpr int kTogether = kLoads<Value>;
  const ExpScale<Value> scale = exp_scale<Value>(set.temperature);
  const unsigned lane = threadIdx.x % kWarp;
  Sums<Value> sums = first_sums<Value>(lane == 0 && set.place >= 0, target);
  for (std::int64_t begin = lane; begin < set.count; begin += kTogether * kWarp) {
    Value x[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const std::int64_t at = begin + k * kWarp;
      x[k] = at < set.count && at != set.place ? capped_logit<is_capped>(set.logits[at], cap).value
                                               : kLeftOut;
    }
    add<true>(x, scale, sums);
  }
  Value top = sums.top;
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    const Value other = __shfl_xor_sync(kAllLanes, top, apart);
    top = other > top ? other : top;
  }
  move_to<true>(top, scale, sums);
  return {top, sum_of_lanes<kWarp>(static_cast<double>(sums.sum)),
          sum_of_lanes<kWarp>(static_cast<double>(sums.moment))};
}

template <class T, bool is_capped>
__global__ void __launch_bounds__(kThreads, 4)
    kept_log_probs_kernel(const KeptRows rows, const Sets sets, const KeptLogProbs out) {
  const std::int64_t i = row_of_warp();
  if (i >= rows.num_rows) return;
  const Set<T> set = set_of<T>(rows, sets, i);
  const Cap<T> cap(rows.softcap);
  const bool has_target = set.place >= 0;
  const T target = has_target ? capped_logit<is_capped>(set.logits[set.place], cap).value : T(0);
  const RowSums sums = fits<T>(set.temperature) ? sum_set<is_capped, T>(set, target, cap)
                                                : sum_set<is_capped, double>(set, target, cap);
  if (threadIdx.x % kWarp > 0) return;
  constexpr double kLowest = -std::numeric_limits<double>::infinity();
  RowResult result{0, 0, {kLowest, kLowest}};
  if (has_target) {
    result = row_result(target, sums, set.temperature);
  } else if (set.count > 0) {
    result = others_result(sums, set.temperature);
  }
  static_cast<T*>(out.log_probs)[i] = static_cast<T>(result.log_prob);
  if (out.entropy != nullptr) static_cast<T*>(out.entropy)[i] = static_cast<T>(result.entropy);
  out.top[i] = result.log_sum_exp.top;
  out.log_sum[i] = result.log_sum_exp.log_sum;
}

// Writes the gradient of a set, which may lie where its logits are: a lane writes over what it has
// read, and over nothing else.
template <class Value, class T, class F>
STEPPO_DEVICE void write_set(const Set<T>& set, T* out, double target, F&& slope) {
  constexpr int kTogether = kLoads<Value>;
  for (std::int64_t begin = threadIdx.x % kWarp; begin < set.count; begin += kTogether * kWarp) {
    T x[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const std::int64_t at = begin + k * kWarp;
      x[k] = at < set.count ? set.logits[at] : T(0);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const std::int64_t at = begin + k * kWarp;
      if (at < set.count) out[at] = static_cast<T>(at == set.place ? target : slope(x[k]));
    }
  }
}

template <class T, bool is_capped>
__global__ void __launch_bounds__(kThreads, 4)
    kept_log_probs_backward_kernel(const KeptRows rows, const Sets sets,
                                   const KeptGradients grads) {
  const std::int64_t i = row_of_warp();
  if (i >= rows.num_rows) return;
  const Set<T> set = set_of<T>(rows, sets, i);
  T* const out = static_cast<T*>(grads.grad_logits) + set.first;
  const double grad = static_cast<const T*>(grads.grad_log_probs)[i];
  const bool has_rise = grads.grad_entropy != nullptr;
  const double grad_entropy = has_rise ? static_cast<const T*>(grads.grad_entropy)[i] : T(0);
  if (grad == 0 && grad_entropy == 0) {
    for (std::int64_t at = threadIdx.x % kWarp; at < set.count; at += kWarp) out[at] = T(0);
    return;
  }
  const Cap<T> cap(rows.softcap);
  Capped<T> target{};
  if (set.place >= 0) target = capped_logit<is_capped>(set.logits[set.place], cap);
  // Gradients may lie where the logits are: all lanes have read the target before one writes.
  __syncwarp();
  const double entropy = has_rise ? static_cast<const T*>(grads.entropy)[i] : T(0);
  const double top = grads.top[i];
  RowGradient gradient = row_gradient(target.value, {top, grads.log_sum[i]}, entropy, grad,
                                      grad_entropy, set.temperature);
  gradient.target *= target.slope;
  if constexpr (sizeof(T) == sizeof(float)) {
    const Slope<is_capped, true, float> slope(set.temperature, top, gradient);
    if (fits_fp32(set.temperature) && slope.is_finite()) {
      write_set<float>(set, out, gradient.target, [&](T logit) { return slope(logit, cap); });
      return;
    }
  }
  const Slope<is_capped, true, double> slope(set.temperature, top, gradient);
  write_set<double>(set, out, gradient.target, [&](T logit) { return slope(logit, cap); });
}

std::int64_t blocks_for(const KeptRows& rows) { return ceil_div(rows.num_rows * kWarp, kThreads); }

}  // namespace

void kept_log_probs(const KeptRows& rows, const Sets& sets, const KeptLogProbs& out,
                    const Place& place) {
  const Launcher launch("kept_log_probs", place);
  with_dtype(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(rows.softcap > 0 ? listed<kept_log_probs_kernel<T, true>>()
                            : listed<kept_log_probs_kernel<T, false>>(),
           blocks_for(rows), kThreads, rows, sets, out);
  });
}

void kept_log_probs_backward(const KeptRows& rows, const Sets& sets, const KeptGradients& grads,
                             const Place& place) {
  const Launcher launch("kept_log_probs_backward", place);
  with_dtype(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(rows.softcap > 0 ? listed<kept_log_probs_backward_kernel<T, true>>()
                            : listed<kept_log_probs_backward_kernel<T, false>>(),
           blocks_for(rows), kThreads, rows, sets, grads);
  });
}

}  // namespace steppo::cuda
