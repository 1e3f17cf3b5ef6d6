// The policy loss on a mask whose runs of ones are the steps: segmentation, sums and loss in one
// pass over the tokens. See losses/policy_loss.py and backends/operators.py of the package.
#include "policy_loss.h"
#include "runs.h"

namespace steppo::cpu::STEPPO_ISA {
namespace {

// Calls on_run(run) for the steps that begin in [begin, end), and on_gap(first, last) for the
// masked tokens of it. A step belongs to the block it begins in, however far it reaches.
template <class OnRun, class OnGap>
void for_steps(const bool* mask, int64_t row_length, int64_t begin, int64_t end, OnRun&& on_run,
               OnGap&& on_gap) {
  for (int64_t first = begin, last; first < end; first = last) {
    const int64_t in_row = first % row_length, row_end = first - in_row + row_length;
    last = row_end < end ? row_end : end;
    const bool open = in_row != 0 && is_set(mask, first - 1);
    const auto take = [&](Run run) {
      if (open && run.begin == first) return;
      if (run.end == last) run.end = find_byte(mask, 0, last, row_end);
      on_run(run);
    };
    for_runs(mask, first, last, open, take, on_gap);
  }
}

}  // namespace

void policy_loss_masked(int dtype, const void* log_probs, const void* old_log_probs,
                        const void* advantages, const void* ref_log_probs, const void* entropy,
                        const void* is_weights, const bool* mask, int64_t row_length,
                        const double* ratio_center, const double* normalizer, int ratio,
                        double clip_low, double clip_high, double dual_clip, double log_ratio_max,
                        int reduction, double kl_coef, int kl_estimator, double entropy_coef,
                        int64_t num_tokens, void* loss, double* metrics, void* grad_log_probs,
                        void* grad_entropy, void* grad_scale, int threads) {
  threads = worthwhile_threads(num_tokens, threads);
  const PolicyConfig config = policy_config(ratio, clip_low, clip_high, dual_clip, log_ratio_max,
                                            reduction, kl_coef, kl_estimator, entropy_coef);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    PolicyCall<T> call =
        policy_call<T>(log_probs, old_log_probs, advantages, ref_log_probs, entropy, is_weights,
                       true, grad_log_probs, grad_entropy, config);
    prepare(call, num_tokens);
    const int64_t blocks = ceil_div(num_tokens, kBlock);
    const auto ignore_gap = [](int64_t, int64_t) {};

    if (config.ratio == kCentered) {
      if (ratio_center != nullptr) {
        call.center = *ratio_center;
      } else {
        Buffer<double> z(blocks), tokens(blocks);
        parallel_blocks(num_tokens, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
          double z_sum = 0, count = 0;
          const auto add = [&](Run run) {
            for (int64_t t = run.begin; t < run.end; ++t) {
              z_sum += static_cast<double>(call.log_probs[t]) -
                       static_cast<double>(call.old_log_probs[t]);
            }
            count += static_cast<double>(run.end - run.begin);
          };
          for_steps(mask, row_length, begin, end, add, ignore_gap);
          z[b] = z_sum;
          tokens[b] = count;
        });
        double z_sum = 0, count = 0;
        for (int64_t b = 0; b < blocks; ++b) {
          z_sum += z[b];
          count += tokens[b];
        }
        call.center = count > 0 ? z_sum / count : 0.0;
      }
    }

    // Count the steps of each row first. `trajectory_mean` needs them for the weights, and with the
    // denominator known the last pass writes final gradients.
    const bool by_row = config.reduction == kTrajectoryMean;
    const int64_t rows = row_length > 0 ? num_tokens / row_length : 0;
    Buffer<RunCounts> counts(rows);
    if (by_row || (normalizer == nullptr && config.reduction != kSum)) {
      parallel_blocks(
          rows, kBlock / (row_length + 1) + 1, threads, [&](int64_t, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
              counts[row] = count_runs(mask, row * row_length, (row + 1) * row_length, false);
            }
          });
      double steps = 0, trajectories = 0, tokens = 0;
      for (int64_t row = 0; row < rows; ++row) {
        steps += static_cast<double>(counts[row].runs);
        trajectories += counts[row].runs > 0;
        tokens += static_cast<double>(counts[row].tokens);
      }
      call.total = reduction_total(config.reduction, steps, trajectories, tokens);
    }
    if (normalizer != nullptr) call.total = *normalizer;

    Buffer<PolicySums> partial(blocks);
    parallel_blocks(num_tokens, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
      PolicySums sums;
      Sum<T> k3;
      const auto add = [&](Run run) {
        const int64_t length = run.end - run.begin;
        const double count =
            by_row ? static_cast<double>(counts[run.begin / row_length].runs) : 1.0;
        const double weight = step_weight(config.reduction, static_cast<double>(length), count);
        add_step(call, Contiguous{run.begin}, length, 0, call.advantages[run.begin], weight, sums,
                 k3);
      };
      const auto clear = [&](int64_t first, int64_t last) {
        if (call.grad_log_probs != nullptr) fill(call.grad_log_probs, first, last, zero);
        if (call.grad_entropy != nullptr) fill(call.grad_entropy, first, last, zero);
      };
      for_steps(mask, row_length, begin, end, add, clear);
      sums.k3 = k3.total();
      partial[b] = sums;
    });
    PolicySums sums;
    for (int64_t b = 0; b < blocks; ++b) sums.add(partial[b]);
    finish<T>(sums, config, call.total, loss, metrics, grad_scale);
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
