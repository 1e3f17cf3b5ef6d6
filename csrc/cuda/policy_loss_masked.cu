// The policy loss on a mask whose runs of ones are the steps. See losses/policy_loss.py and
// backends/operators.py of the package.
#include <algorithm>
#include <type_traits>

#include "masked_steps.cuh"
#include "policy_call.cuh"

namespace steppo::cuda {
namespace {

// From this length on, rows are counted by a launch of its own, if they are so few that each has a
// counter: every warp would read all of its row.
constexpr std::int64_t kLongRow = 16384, kMostLongRows = Workspace::kCounters - kFirstRunCounter;

bool counts_before(const PolicyConfig& config, const Mask& masked, std::int64_t rows) {
  return config.reduction == kTrajectoryMean && masked.row_length >= kLongRow &&
         rows <= kMostLongRows;
}

// Counts the runs of rows, a chunk a warp.
__global__ void __launch_bounds__(kThreads, 4)
    count_runs_of_rows_kernel(const Mask masked, Workspace* workspace, const Chunks chunks) {
  const int lane = threadIdx.x % kWarp;
  for (ChunkPlace at = chunks.first(blockIdx.x * kWarps + threadIdx.x / kWarp);
       at.row < chunks.num_rows; chunks.advance(at)) {
    const std::int64_t row_begin = at.row * masked.row_length;
    const std::int64_t row_end = row_begin + masked.row_length;
    const std::int64_t begin = row_begin + at.chunk * kChunk;
    const auto words = words_of<kWords>(masked, begin, row_end, lane);
    unsigned last = begin > row_begin && is_set(masked.mask, begin - 1);
    int runs = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) runs += __popc(begins_of(words.at[k], last));
    if (lane == 0 && runs > 0) {
      atomicAdd(&workspace->counters[kFirstRunCounter + at.row], static_cast<unsigned>(runs));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    masked_center_kernel(const PolicyTensors tensors, const Mask masked, const PolicyConfig config,
                         Workspace* workspace) {
  const PolicyArrays<T> call = arrays_of<T>(tensors);
  Center sum;
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
#pragma unroll 4
  for (std::int64_t t = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; t < masked.num_tokens;
       t += stride) {
    if (is_set(masked.mask, t)) sum.add(call, config, t, t);
  }
  sum_of_thread<kThreads, Center>() = sum;
  leave_center(workspace);
}

// The warps of a block look for steps, some chunks each, and then the block takes what all of them
// have found: long steps by all threads, others by warps, and short ones, unless a warp is there
// for each step, by groups of lanes.
template <class T, int form>
__global__ void __launch_bounds__(kThreads, kBlocksOfCore<T, form>)
    policy_loss_masked_kernel(const PolicyTensors tensors, const Mask masked,
                              const PolicyConfig given, Workspace* workspace, const Chunks chunks,
                              int counted_rows) {
  PolicyArrays<T> call = arrays_of<T>(tensors);
  PolicyConfig config = given;
  if constexpr (form == kPlain) leave_out(call, config);
  const double center = center_of(tensors, config, workspace);
  const bool counts = config.reduction == kTrajectoryMean;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  CallSums& own = sum_of_thread<kThreads, CallSums>();
  STEPPO_SHARED(StepSlots, slots);
  const auto add = [&](auto sharers, const FoundStep& step) {
    constexpr int kSharers = decltype(sharers)::value;
    const PolicyRun run{step.length, step.start, static_cast<int>(threadIdx.x % kSharers)};
    const double weight =
        step_weight(config.reduction, static_cast<double>(step.length), step.steps_of_row);
    add_step<kSharers, form == kOfTokens>(call, run, config, weight, center, own.sums);
    if (counts && run.lane == 0 && run.length > 0) own.trajectories += 1.0 / step.steps_of_row;
  };
  const unsigned* const counted =
      counted_rows > 0 ? workspace->counters + kFirstRunCounter : nullptr;
  const StepFinder<T> finder{call, masked, chunks, counted, counts, lane};
  ChunkPlace at = chunks.first(blockIdx.x * kWarps + warp);
  // Threads meet in barriers, and go through the loop together.
  for (std::int64_t turn = 0; turn < chunks.turns; turn += kTogether) {
    // What lies in the slots has been taken.
    if (turn > 0) __syncthreads();
    const int slot = warp * kTogether;
    if (lane < kTogether) slots.clear(slot + lane);
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < kTogether && at.row < chunks.num_rows; ++k) {
      const ChunkPlace here = at;
      chunks.advance(at);
      if (at.row < chunks.num_rows) finder.prefetch_mask(at);
      finder.fill(slots, slot + k, here);
    }
    __syncthreads();
    const Numbering shorts(slots.shorts[lane]), others(slots.others[lane]);
    const bool has_warps = shorts.count + others.count <= kWarps;
    const int of_warps = others.count + (has_warps ? shorts.count : 0);
    for (int i = warp; i < of_warps; i += kWarps) {
      const FoundStep step = i < others.count ? slots.other_step(others.place_of(i))
                                              : slots.short_step(shorts.place_of(i - others.count));
      add(std::integral_constant<int, kWarp>{}, step);
    }
    // The last warp begins: the first ones have others.
    constexpr int kGroups = kWarp / kGroup;
    for (int i = has_warps ? shorts.count : (kWarps - 1 - warp) * kGroups; i < shorts.count;
         i += kWarps * kGroups) {
      StepPlace own_place{-1, 0};
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (i + group >= shorts.count) continue;
        const StepPlace place = shorts.place_of(i + group);
        if (lane / kGroup == group) own_place = place;
      }
      add(std::integral_constant<int, kGroup>{},
          own_place.slot >= 0 ? slots.short_step(own_place) : FoundStep{0, 0, 1});
    }
    unsigned left = __ballot_sync(kAllLanes, slots.shared[lane].length > 0);
    for (; left != 0; left &= left - 1) {
      add(std::integral_constant<int, kThreads>{}, slots.shared[__ffs(static_cast<int>(left)) - 1]);
    }
  }
  finish_call<T>(tensors, config, workspace, counted_rows);
}

}  // namespace

void policy_loss_masked(const PolicyTensors& tensors, const Mask& masked,
                        const PolicyConfig& config, const Place& place) {
  const Launcher launch("policy_loss_masked", place);
  Workspace* const workspace = static_cast<Workspace*>(place.workspace);
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (needs_center(tensors, config)) {
      launch(listed<masked_center_kernel<T>>(), step_blocks_for(masked.num_tokens), kThreads,
             tensors, masked, config, workspace);
    }
    const std::int64_t rows = masked.row_length > 0 ? masked.num_tokens / masked.row_length : 0;
    const std::int64_t threads = rows * ceil_div(masked.row_length, kChunk) * kWarp;
    const int counted_rows = counts_before(config, masked, rows) ? static_cast<int>(rows) : 0;
    if (counted_rows > 0) {
      const std::int64_t blocks = step_blocks_for(threads);
      launch(listed<count_runs_of_rows_kernel>(), blocks, kThreads, masked, workspace,
             chunks_of(masked, rows, blocks));
    }
    const Form form = form_of(tensors, config, false);
    const std::int64_t blocks = step_blocks_for(threads, form);
    launch(form == kPlain     ? listed<policy_loss_masked_kernel<T, kPlain>>()
           : form == kOfSteps ? listed<policy_loss_masked_kernel<T, kOfSteps>>()
                              : listed<policy_loss_masked_kernel<T, kOfTokens>>(),
           blocks, kThreads, tensors, masked, config, workspace, chunks_of(masked, rows, blocks),
           counted_rows);
  });
}

}  // namespace steppo::cuda
