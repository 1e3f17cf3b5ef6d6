// The policy loss on a StepLayout: see losses/policy_loss.py and backends/operators.py of the
// package.
#include "policy_loss.h"

#include "outline.h"

namespace steppo::cpu::STEPPO_ISA {
namespace {

// mean z over all action tokens, the default center of the centered ratio.
template <class T>
double mean_log_ratio(const PolicyCall<T>& call, const Steps& steps, int threads) {
  const int64_t count = steps.num_actions;
  if (count == 0) return 0;
  Buffer<double> partial(ceil_div(count, kBlock));
  parallel_blocks(count, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = steps.token_index[i];
      sum += pooled_log_ratio(call, call.config, call.clips_tokens, t,
                              call.advantages_per_token ? t : steps.step_ids[t]);
    }
    partial[b] = sum;
  });
  double total = 0;
  for (int64_t b = 0; b < ceil_div(count, kBlock); ++b) total += partial[b];
  return total / static_cast<double>(count);
}

}  // namespace

void policy_loss(const PolicyTensors& tensors, const Steps& steps, const PolicyConfig& config,
                 const Place& place) {
  const int threads = worthwhile_threads(steps.num_tokens * token_cost(config), place.threads);
  const int64_t num_steps = steps.num_steps;
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    PolicyCall<T> call(tensors, config);
    prepare(call, steps.num_tokens);
    // The denominator of the reduction, known before the loss, makes the gradients final. Where
    // steps ascend, what lies between them is zeroed on the way.
    const Outline found =
        outline(steps.step_offsets, steps.step_starts,
                config.reduction == kTrajectoryMean ? steps.trajectory_counts : nullptr, num_steps,
                threads);
    const double num_actions = static_cast<double>(steps.num_actions);
    double count = reduction_count(config.reduction, found.steps, found.trajectories, num_actions);
    call.total = count > 1.0 ? count : 1.0;
    if (tensors.normalizer.is_given) call.total = count = value_of(tensors.normalizer);
    T* log_ratios = static_cast<T*>(tensors.step_log_ratio);
    if (config.ratio == kCentered) {
      call.center = tensors.ratio_center.is_given ? value_of(tensors.ratio_center)
                                                  : mean_log_ratio(call, steps, threads);
    }
    if (!found.is_ascending) {
      parallel_blocks(steps.num_tokens, kBlock, threads,
                      [&](int64_t, int64_t begin, int64_t end) { clear(call, begin, end); });
    }

    // Tasks are ranges of steps of about the same work, a step counting for one token more.
    const int64_t* const offsets = steps.step_offsets;
    const int64_t work = steps.num_actions + num_steps;
    const int64_t tasks = ceil_div(work, kBlock);
    Buffer<PolicySums> partial(tasks);
    const auto border = [&](int64_t wanted) {
      return first_not_below(num_steps, wanted, [&](int64_t s) { return offsets[s] + s; });
    };
    // Where the last step before s ends that is not empty.
    const auto end_before = [&](int64_t s) {
      const int64_t next = first_not_below(s, offsets[s], [&](int64_t t) { return offsets[t]; });
      if (next == 0) return int64_t{0};
      return steps.step_starts[next - 1] + offsets[next] - offsets[next - 1];
    };
    parallel_blocks(work, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
      PolicySums sums;
      Sum<T> k3;
      const int64_t first = border(begin), last = end == work ? num_steps : border(end);
      int64_t done = found.is_ascending ? end_before(first) : 0;
      for (int64_t s = first; s < last; ++s) {
        if (const int64_t ahead = s + kStepsAhead; ahead < last && steps.step_starts[ahead] >= 0) {
          fetch(call, steps.step_starts[ahead], offsets[ahead + 1] - offsets[ahead]);
        }
        const int64_t length = offsets[s + 1] - offsets[s], start = steps.step_starts[s];
        if (length == 0) {
          log_ratios[s] = T(0);
          continue;
        }
        if (found.is_ascending) {
          clear(call, done, start);
          done = start + length;
        }
        const double weight = weight_of(call.step_weights, s, config.reduction,
                                        static_cast<double>(length), steps.trajectory_counts[s]);
        const PolicyStep step{s, length, weight};
        const double log_ratio =
            start >= 0 ? add_step(call, Contiguous{start}, step, sums, k3)
                       : add_step(call, Gathered{steps.token_index + offsets[s]}, step, sums, k3);
        log_ratios[s] = static_cast<T>(log_ratio);
      }
      if (found.is_ascending && end == work) clear(call, done, steps.num_tokens);
      sums.k3 = k3.total();
      partial[b] = sums;
    });
    if (work == 0) clear(call, 0, steps.num_tokens);
    PolicySums sums;
    for (int64_t b = 0; b < tasks; ++b) merge(sums, partial[b]);
    // The gradients are final.
    finish<T>(sums, config, call.total, count, tensors);
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
