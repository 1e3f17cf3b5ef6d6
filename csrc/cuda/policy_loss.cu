// The policy loss on a StepLayout: see losses/policy_loss.py and backends/operators.py of the
// package.
#include <algorithm>

#include "last_block.cuh"
#include "policy_call.cuh"

namespace steppo::cuda {
namespace {

// Ids of tokens that a thread loads at once, and how many packs of them.
constexpr int kIds = 4, kPacks = 2;
constexpr std::int64_t kIdsTogether = kIds * kPacks;

// mu of the centered ratio: the mean of z over all action tokens.
template <class T>
__global__ void __launch_bounds__(kThreads)
    center_kernel(const PolicyTensors tensors, const Steps steps, const PolicyConfig config,
                  Workspace* workspace) {
  const PolicyArrays<T> call = arrays_of<T>(tensors);
  Center sum;
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
#pragma unroll 4
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < steps.num_actions;
       i += stride) {
    const std::int64_t t = steps.token_index[i];
    sum.add(call, config, t, call.advantages_per_token ? t : steps.step_ids[t]);
  }
  sum_of_thread<kThreads, Center>() = sum;
  leave_center(workspace);
}

using Ids = Pack<std::int32_t, kIds>;

// The ids from token t on; behind the last token, those of a step.
STEPPO_DEVICE Ids ids_from(const Steps& steps, std::int64_t t, bool wide) {
  if (wide && t + kIds <= steps.num_tokens) {
    return *reinterpret_cast<const Ids*>(steps.step_ids + t);
  }
  Ids ids{};
  for (int k = 0; k < kIds && t + k < steps.num_tokens; ++k) ids.at[k] = steps.step_ids[t + k];
  return ids;
}

// Zeroes the gradients of tokens that are no action's. Neighbouring threads have neighbours. While
// it waits for the first ids, it calls `meanwhile`.
template <class T, class Meanwhile>
STEPPO_DEVICE void clear(const PolicyArrays<T>& call, const Steps& steps, Meanwhile&& meanwhile) {
  if (call.grad_log_probs == nullptr && call.grad_entropy == nullptr) return;
  const bool wide = is_wide(steps.step_ids);
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads * kIds;
  for (std::int64_t first = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * kIds;
       first < steps.num_tokens; first += kPacks * stride) {
    Ids ids[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) ids[p] = ids_from(steps, first + p * stride, wide);
    if (first < stride) meanwhile();
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const std::int64_t t = first + p * stride;
#pragma unroll
      for (int k = 0; k < kIds; ++k) {
        if (ids[p].at[k] >= 0) continue;
        if (call.grad_log_probs != nullptr) call.grad_log_probs[t + k] = T(0);
        if (call.grad_entropy != nullptr) call.grad_entropy[t + k] = T(0);
      }
    }
  }
}

// What a group of lanes has to know of a step before it comes to the tokens.
template <class T>
struct StepHead {
  std::int64_t begin, length, start;
  T advantage;
  std::int32_t trajectory_count;
};

// The head of step s; an empty step's behind the last one.
template <class T>
STEPPO_DEVICE StepHead<T> head_of(const PolicyArrays<T>& call, const Steps& steps, bool counts,
                                  std::int64_t s) {
  StepHead<T> head{};
  if (s >= steps.num_steps) return head;
  head.begin = steps.step_offsets[s];
  head.length = steps.step_offsets[s + 1] - head.begin;
  head.start = steps.step_starts[s];
  if (!call.advantages_per_token) head.advantage = call.advantages[s];
  if (counts) head.trajectory_count = steps.trajectory_counts[s];
  return head;
}

// `lanes` threads take a step.
template <class T, int lanes, int form>
__global__ void __launch_bounds__(kThreads, kBlocksOfCore<T, form>)
    policy_loss_kernel(const PolicyTensors tensors, const Steps steps, const PolicyConfig given,
                       Workspace* workspace) {
  PolicyArrays<T> call = arrays_of<T>(tensors);
  PolicyConfig config = given;
  if constexpr (form == kPlain) {
    leave_out(call, config);
    call.advantages_per_token = false;
  }
  CallSums& own = sum_of_thread<kThreads, CallSums>();
  constexpr int kGroups = kThreads / lanes;
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const std::int64_t stride = std::int64_t{gridDim.x} * kGroups;
  const bool counts = config.reduction == kTrajectoryMean;
  std::int64_t first = std::int64_t{blockIdx.x} * kGroups;
  // It is under way while gradients are zeroed, and the next one while a step is added.
  StepHead<T> next = head_of(call, steps, counts, first + group);
  clear(call, steps, [&] {
    // The tokens of the first step are on their way then. Where fewer lanes share a step, there are
    // so many steps that this takes longer than it saves.
    if constexpr (lanes >= kWarp) {
      const std::int64_t at = lane * (kBytesOfLine / sizeof(T));
      if (next.start >= 0 && at < next.length) prefetch_token(call, next.start + at);
    }
  });
  const double center = center_of(tensors, config, workspace);
  // Lanes meet in sums, and go through the loop together.
  for (; first < steps.num_steps; first += stride) {
    const std::int64_t s = first + group;
    const StepHead<T> head = next;
    next = head_of(call, steps, counts, s + stride);
    const PolicyStep<T> step{s,    head.length,   head.start, steps.token_index + head.begin,
                             lane, head.advantage};
    double weight = 0;
    if (step.length > 0) {
      const double count = counts ? head.trajectory_count : 1.0;
      weight = weight_of(call.step_weights, s, config.reduction, static_cast<double>(step.length),
                         count);
      if (counts && lane == 0) own.trajectories += 1.0 / count;
    }
    const double log_ratio =
        add_step<lanes, form == kOfTokens>(call, step, config, weight, center, own.sums);
    if (s < steps.num_steps && lane == 0) {
      static_cast<T*>(tensors.step_log_ratio)[s] = static_cast<T>(log_ratio);
    }
  }
  finish_call<T>(tensors, config, workspace);
}

template <class T, int lanes>
void launch_by(const Launcher& launch, const PolicyTensors& tensors, const Steps& steps,
               const PolicyConfig& config, Workspace* workspace) {
  const std::int64_t threads =
      std::max(steps.num_steps * lanes, ceil_div(steps.num_tokens, kIdsTogether));
  const Form form = form_of(tensors, config, tensors.advantages_per_token);
  launch(form == kPlain     ? listed<policy_loss_kernel<T, lanes, kPlain>>()
         : form == kOfSteps ? listed<policy_loss_kernel<T, lanes, kOfSteps>>()
                            : listed<policy_loss_kernel<T, lanes, kOfTokens>>(),
         step_blocks_for(threads, form), kThreads, tensors, steps, config, workspace);
}

}  // namespace

void policy_loss(const PolicyTensors& tensors, const Steps& steps, const PolicyConfig& config,
                 const Place& place) {
  const Launcher launch("policy_loss", place);
  Workspace* const workspace = static_cast<Workspace*>(place.workspace);
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    // The mean is known before any step is, and so it takes a launch of its own.
    if (needs_center(tensors, config) && steps.num_actions > 0) {
      launch(listed<center_kernel<T>>(), step_blocks_for(steps.num_actions), kThreads, tensors,
             steps, config, workspace);
    }
    // Lanes enough for all threads to have work, but each of them a few tokens, and not so many
    // that groups of them take several steps after each other while a smaller one would take one.
    const std::int64_t length = steps.num_steps > 0 ? steps.num_actions / steps.num_steps : 0;
    const std::int64_t most =
        most_step_blocks(form_of(tensors, config, tensors.advantages_per_token)) * kThreads;
    const auto suits = [&](int lanes) {
      const bool has_room = steps.num_steps * lanes <= most;
      return length >= (has_room ? 1 : 8) * lanes;
    };
    if (length >= kLongStep && steps.num_steps * kThreads <= most) {
      launch_by<T, kThreads>(launch, tensors, steps, config, workspace);
    } else if (suits(kWarp)) {
      launch_by<T, kWarp>(launch, tensors, steps, config, workspace);
    } else if (suits(16)) {
      launch_by<T, 16>(launch, tensors, steps, config, workspace);
    } else if (length >= 4) {
      launch_by<T, 8>(launch, tensors, steps, config, workspace);
    } else {
      launch_by<T, 1>(launch, tensors, steps, config, workspace);
    }
  });
}

}  // namespace steppo::cuda
