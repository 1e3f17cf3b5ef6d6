// The policy loss on a mask whose runs of ones are the steps: segmentation, sums and loss in one
// pass over the tokens. See steppo_kernels/policy_loss.py and ops.py.
#include "policy_loss.h"

namespace steppo::cpu::STEPPO_ISA {
namespace {

// Calls on_run(run) for the steps that begin in [begin, end), and on_gap(first, last) for the
// masked tokens of it. A step belongs to the block it begins in, however far it reaches.
template <class OnRun, class OnGap>
void for_runs(const bool* mask, int64_t row_length, int64_t num_tokens, int64_t begin, int64_t end,
              OnRun&& on_run, OnGap&& on_gap) {
  int64_t at = begin;
  const auto row_end = [&](int64_t t) {
    const int64_t last = t - t % row_length + row_length;
    return last < num_tokens ? last : num_tokens;
  };
  if (at % row_length != 0 && mask[at - 1]) at = find_byte(mask, 0, at, row_end(at));
  while (at < end) {
    const int64_t first = find_byte(mask, 1, at, end);
    on_gap(at, first);
    if (first == end) break;
    const int64_t last = find_byte(mask, 0, first, row_end(first));
    on_run(Run{first, last});
    at = last;
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
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    PolicyCall<T> call{static_cast<const T*>(log_probs),
                       static_cast<const T*>(old_log_probs),
                       static_cast<const T*>(advantages),
                       static_cast<const T*>(ref_log_probs),
                       static_cast<const T*>(entropy),
                       static_cast<const T*>(is_weights),
                       true,
                       static_cast<T*>(grad_log_probs),
                       static_cast<T*>(grad_entropy),
                       {static_cast<Ratio>(ratio), clip_low, clip_high, dual_clip, log_ratio_max,
                        static_cast<Reduction>(reduction), kl_coef,
                        static_cast<KLEstimator>(kl_estimator), entropy_coef},
                       0.0,
                       1.0};
    const int64_t blocks = ceil_div(num_tokens, kBlock);
    const auto ignore_gap = [](int64_t, int64_t) {};

    if (call.config.ratio == kCentered) {
      if (ratio_center != nullptr) {
        call.center = *ratio_center;
      } else if (call.old_log_probs != nullptr) {
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
          for_runs(mask, row_length, num_tokens, begin, end, add, ignore_gap);
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

    // Counted first: a step's weight in its trajectory takes the steps of its row, and with the
    // denominator known the gradients are final.
    const bool by_row = call.config.reduction == kTrajectoryMean;
    const int64_t rows = row_length > 0 ? num_tokens / row_length : 0;
    Buffer<int64_t> row_steps(rows), row_tokens(rows);
    if (by_row || (normalizer == nullptr && call.config.reduction != kSum)) {
      parallel_blocks(rows, kBlock / (row_length + 1) + 1, threads,
                      [&](int64_t, int64_t begin, int64_t end) {
                        for (int64_t row = begin; row < end; ++row) {
                          row_steps[row] = row_tokens[row] = 0;
                          const auto count = [&](Run run) {
                            ++row_steps[row];
                            row_tokens[row] += run.end - run.begin;
                          };
                          for_runs(mask, row_length, num_tokens, row * row_length,
                                   (row + 1) * row_length, count, ignore_gap);
                        }
                      });
      double steps = 0, trajectories = 0, tokens = 0;
      for (int64_t row = 0; row < rows; ++row) {
        steps += static_cast<double>(row_steps[row]);
        trajectories += row_steps[row] > 0;
        tokens += static_cast<double>(row_tokens[row]);
      }
      call.total = reduction_total(call.config.reduction, steps, trajectories, tokens);
    }
    if (normalizer != nullptr) call.total = *normalizer;

    Buffer<PolicySums> partial(blocks);
    parallel_blocks(num_tokens, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
      PolicySums sums;
      const auto add = [&](Run run) {
        const int64_t length = run.end - run.begin;
        const double count = by_row ? static_cast<double>(row_steps[run.begin / row_length]) : 1.0;
        const double weight =
            step_weight(call.config.reduction, static_cast<double>(length), count);
        add_step(call, Contiguous{run.begin}, length, 0, call.advantages[run.begin], weight, sums);
      };
      const auto clear = [&](int64_t first, int64_t last) {
        if (call.grad_log_probs != nullptr) fill(call.grad_log_probs, first, last, zero);
        if (call.grad_entropy != nullptr) fill(call.grad_entropy, first, last, zero);
      };
      for_runs(mask, row_length, num_tokens, begin, end, add, clear);
      partial[b] = sums;
    });
    PolicySums sums;
    for (int64_t b = 0; b < blocks; ++b) sums.add(partial[b]);
    finish<T>(sums, call.config, call.total, loss, metrics, grad_scale);
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
