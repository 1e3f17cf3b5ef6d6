// The policy loss on a StepLayout: see losses/policy_loss.py and backends/operators.py of the
// package.
#include "policy_loss.h"

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
      const double z =
          static_cast<double>(call.log_probs[t]) - static_cast<double>(call.old_log_probs[t]);
      if (call.clips_tokens) {
        const int64_t owner = call.advantages_per_token ? t : steps.step_ids[t];
        sum += held_log_ratio<double>(z, call.advantages[owner], call.config);
      } else {
        sum += z;
      }
    }
    partial[b] = sum;
  });
  double total = 0;
  for (int64_t b = 0; b < ceil_div(count, kBlock); ++b) total += partial[b];
  return total / static_cast<double>(count);
}

// What a first look at the steps tells.
struct Outline {
  double steps = 0, trajectories = 0;  // not empty ones; a sum of 1 / count
  bool is_ascending = true;            // every step lies in one piece, behind the one before it
};

// The denominator of the reduction, known before the loss, makes the gradients final. Where steps
// ascend, what lies between them can be zeroed on the way.
Outline outline(const Steps& steps, Reduction reduction, int threads) {
  constexpr int64_t kSteps = 16384;
  const int64_t blocks = ceil_div(steps.num_steps, kSteps);
  struct Part {
    Outline outline;
    int64_t first = -1, end = 0;  // where the first step of the block begins and the last one ends
  };
  Buffer<Part> parts(blocks);
  parallel_blocks(steps.num_steps, kSteps, threads, [&](int64_t b, int64_t begin, int64_t end) {
    Part part;
    int64_t count = 0;
    double sum = 0;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t length = steps.step_offsets[s + 1] - steps.step_offsets[s];
      if (length == 0) continue;
      const int64_t start = steps.step_starts[s];
      ++count;
      if (reduction == kTrajectoryMean) sum += 1.0 / steps.trajectory_counts[s];
      part.outline.is_ascending &= start >= part.end;
      if (part.first < 0) part.first = start;
      part.end = start + length;
    }
    part.outline.steps = static_cast<double>(count);
    part.outline.trajectories = sum;
    parts[b] = part;
  });
  Outline all;
  int64_t end = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const Part& part = parts[b];
    all.steps += part.outline.steps;
    all.trajectories += part.outline.trajectories;
    if (part.outline.steps == 0) continue;
    all.is_ascending &= part.outline.is_ascending && part.first >= end;
    end = part.end;
  }
  return all;
}

}  // namespace

void policy_loss(const PolicyTensors& tensors, const Steps& steps, const PolicyConfig& config,
                 const Place& place) {
  const int threads = worthwhile_threads(steps.num_tokens, place.threads);
  const int64_t num_steps = steps.num_steps;
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    PolicyCall<T> call(tensors, config);
    prepare(call, steps.num_tokens);
    const Outline found = outline(steps, config.reduction, threads);
    const double num_actions = static_cast<double>(steps.num_actions);
    double count = reduction_count(config.reduction, found.steps, found.trajectories, num_actions);
    call.total = count > 1.0 ? count : 1.0;
    if (tensors.normalizer != nullptr) call.total = count = *tensors.normalizer;
    T* log_ratios = static_cast<T*>(tensors.step_log_ratio);
    if (config.ratio == kCentered) {
      call.center = tensors.ratio_center != nullptr ? *tensors.ratio_center
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
        const double weight = call.step_weights != nullptr
                                  ? static_cast<double>(call.step_weights[s])
                                  : step_weight(config.reduction, static_cast<double>(length),
                                                steps.trajectory_counts[s]);
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
    for (int64_t b = 0; b < tasks; ++b) sums.add(partial[b]);
    finish(sums, call, count, tensors);
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
