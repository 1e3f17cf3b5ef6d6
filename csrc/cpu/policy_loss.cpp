// The policy loss on a StepLayout: see losses/policy_loss.py and backends/operators.py of the
// package.
#include "policy_loss.h"

namespace steppo::cpu::STEPPO_ISA {
namespace {

// mean z over all action tokens, the default center of the centered ratio.
template <class T>
double mean_log_ratio(const T* now, const T* old, const int64_t* token_index, int64_t num_actions,
                      int threads) {
  if (num_actions == 0) return 0;
  Buffer<double> partial(ceil_div(num_actions, kBlock));
  parallel_blocks(num_actions, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = token_index[i];
      sum += static_cast<double>(now[t]) - static_cast<double>(old[t]);
    }
    partial[b] = sum;
  });
  double total = 0;
  for (int64_t b = 0; b < ceil_div(num_actions, kBlock); ++b) total += partial[b];
  return total / static_cast<double>(num_actions);
}

// The denominator of the reduction. Known before the loss, it makes the gradients final.
double normalizer_of(Reduction reduction, const int64_t* step_offsets,
                     const int32_t* trajectory_counts, int64_t num_steps, int threads) {
  constexpr int64_t kSteps = 16384;
  const int64_t blocks = ceil_div(num_steps, kSteps);
  Buffer<double> steps(blocks), trajectories(blocks);
  parallel_blocks(num_steps, kSteps, threads, [&](int64_t b, int64_t begin, int64_t end) {
    int64_t count = 0;
    double sum = 0;
    for (int64_t s = begin; s < end; ++s) count += step_offsets[s + 1] > step_offsets[s];
    if (reduction == kTrajectoryMean) {
      for (int64_t s = begin; s < end; ++s) {
        if (step_offsets[s + 1] > step_offsets[s]) sum += 1.0 / trajectory_counts[s];
      }
    }
    steps[b] = static_cast<double>(count);
    trajectories[b] = sum;
  });
  double count = 0, sum = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    count += steps[b];
    sum += trajectories[b];
  }
  return reduction_total(reduction, count, sum, static_cast<double>(step_offsets[num_steps]));
}

}  // namespace

void policy_loss(int dtype, const void* log_probs, const void* old_log_probs,
                 const void* advantages, const void* ref_log_probs, const void* entropy,
                 const void* is_weights, const void* step_weights, bool advantages_per_token,
                 bool is_weights_per_token, const int64_t* token_index, const int64_t* step_offsets,
                 const int32_t* trajectory_counts, const double* ratio_center,
                 const double* normalizer, int ratio, double clip_low, double clip_high,
                 double dual_clip, double log_ratio_max, int reduction, double kl_coef,
                 int kl_estimator, double entropy_coef, int64_t num_tokens, int64_t num_steps,
                 void* loss, double* metrics, void* step_log_ratio, void* grad_log_probs,
                 void* grad_entropy, void* grad_scale, int64_t* ends_tell, int threads) {
  threads = worthwhile_threads(num_tokens, threads);
  const PolicyConfig config = policy_config(ratio, clip_low, clip_high, dual_clip, log_ratio_max,
                                            reduction, kl_coef, kl_estimator, entropy_coef);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    PolicyCall<T> call =
        policy_call<T>(log_probs, old_log_probs, advantages, ref_log_probs, entropy, is_weights,
                       is_weights_per_token, grad_log_probs, grad_entropy, config);
    prepare(call, num_tokens);
    call.total = normalizer != nullptr ? *normalizer
                                       : normalizer_of(config.reduction, step_offsets,
                                                       trajectory_counts, num_steps, threads);
    const T* weights = static_cast<const T*>(step_weights);
    T* log_ratios = static_cast<T*>(step_log_ratio);
    const int64_t num_actions = step_offsets[num_steps];
    if (config.ratio == kCentered) {
      call.center = ratio_center != nullptr ? *ratio_center
                                            : mean_log_ratio(call.log_probs, call.old_log_probs,
                                                             token_index, num_actions, threads);
    }

    if (num_actions < num_tokens) {
      parallel_blocks(num_tokens, kBlock, threads, [&](int64_t, int64_t begin, int64_t end) {
        if (call.grad_log_probs != nullptr) fill(call.grad_log_probs, begin, end, zero);
        if (call.grad_entropy != nullptr) fill(call.grad_entropy, begin, end, zero);
      });
    }

    // Tasks are ranges of steps of about the same work, a step counting for one token more.
    const int64_t work = num_actions + num_steps;
    const int64_t tasks = ceil_div(work, kBlock);
    Buffer<PolicySums> partial(tasks);
    Buffer<bool> told(tasks);
    const auto border = [&](int64_t wanted) {
      return first_not_below(num_steps, wanted, [&](int64_t s) { return step_offsets[s] + s; });
    };
    parallel_blocks(work, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
      PolicySums sums;
      Sum<T> k3;
      bool all_told = true;
      const int64_t last = end == work ? num_steps : border(end);
      for (int64_t s = border(begin); s < last; ++s) {
        const int64_t* index = token_index + step_offsets[s];
        const int64_t length = step_offsets[s + 1] - step_offsets[s];
        if (length == 0) {
          log_ratios[s] = T(0);
          continue;
        }
        const double advantage = call.advantages[advantages_per_token ? index[0] : s];
        const double weight =
            weights != nullptr
                ? static_cast<double>(weights[s])
                : step_weight(config.reduction, static_cast<double>(length), trajectory_counts[s]);
        bool contiguous = index[length - 1] - index[0] == length - 1;
        if (contiguous && ends_tell != nullptr) {
          contiguous = follow_each_other(index, length);
          all_told &= contiguous;
        }
        const double log_ratio =
            contiguous
                ? add_step(call, Contiguous{index[0]}, length, s, advantage, weight, sums, k3)
                : add_step(call, Gathered{index}, length, s, advantage, weight, sums, k3);
        log_ratios[s] = static_cast<T>(log_ratio);
      }
      sums.k3 = k3.total();
      partial[b] = sums;
      told[b] = all_told;
    });
    PolicySums sums;
    bool all_told = true;
    for (int64_t b = 0; b < tasks; ++b) {
      sums.add(partial[b]);
      all_told &= told[b];
    }
    if (ends_tell != nullptr) *ends_tell = all_told;
    finish<T>(sums, config, call.total, loss, metrics, grad_scale);
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
