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

void policy_loss_masked(const PolicyTensors& tensors, const Mask& masked,
                        const PolicyConfig& config, const Place& place) {
  const bool* const mask = masked.mask;
  const int64_t num_tokens = masked.num_tokens, row_length = masked.row_length;
  const int threads = worthwhile_threads(num_tokens * token_cost(config), place.threads);
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    PolicyCall<T> call(tensors, config);
    prepare(call, num_tokens);
    const int64_t blocks = ceil_div(num_tokens, kBlock);
    const auto ignore_gap = [](int64_t, int64_t) {};

    if (config.ratio == kCentered) {
      if (tensors.ratio_center.is_given) {
        call.center = value_of(tensors.ratio_center);
      } else {
        Buffer<double> z(blocks), tokens(blocks);
        parallel_blocks(num_tokens, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
          double z_sum = 0, count = 0;
          const auto add = [&](Run run) {
            for (int64_t t = run.begin; t < run.end; ++t) {
              z_sum += pooled_log_ratio(call, config, call.clips_tokens, t, t);
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
    const bool is_given = tensors.normalizer.is_given;
    const int64_t rows = row_length > 0 ? num_tokens / row_length : 0;
    Buffer<RunCounts> counts(rows);
    double total = 1;
    if (by_row || (!is_given && config.reduction != kSum)) {
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
      total = reduction_count(config.reduction, steps, trajectories, tokens);
      call.total = total > 1.0 ? total : 1.0;
    }
    if (is_given) call.total = total = value_of(tensors.normalizer);

    Buffer<PolicySums> partial(blocks);
    parallel_blocks(num_tokens, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
      PolicySums sums;
      Sum<T> k3;
      const auto take = [&](Run run) {
        const int64_t length = run.end - run.begin;
        const double count =
            by_row ? static_cast<double>(counts[run.begin / row_length].runs) : 1.0;
        const double weight = step_weight(config.reduction, static_cast<double>(length), count);
        add_step(call, Contiguous{run.begin}, PolicyStep{0, length, weight}, sums, k3);
      };
      // Steps wait until some more have been found, whose tokens are asked for meanwhile.
      Run waiting[kStepsAhead];
      int64_t seen = 0;
      const auto add = [&](Run run) {
        fetch(call, run.begin, run.end - run.begin);
        Run& place = waiting[seen % kStepsAhead];
        if (seen >= kStepsAhead) take(place);
        place = run;
        ++seen;
      };
      for_steps(mask, row_length, begin, end, add,
                [&](int64_t first, int64_t last) { clear(call, first, last); });
      const int64_t left = seen < kStepsAhead ? seen : kStepsAhead;
      for (int64_t k = seen - left; k < seen; ++k) take(waiting[k % kStepsAhead]);
      sums.k3 = k3.total();
      partial[b] = sums;
    });
    PolicySums sums;
    for (int64_t b = 0; b < blocks; ++b) merge(sums, partial[b]);
    // The gradients are final.
    finish<T>(sums, config, call.total, total, tensors);
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
