// Adds up the rewards of tokens by the steps that own them.
//
// Ids do not decrease along a row. A step owns the tokens from its first one in the row to the next
// step's, and the first step of a row also those before it; what a row without a step holds is
// lost. The tokens that a step owns in a row are a run.
#pragma once

#include <cmath>

#include "gae_call.cuh"

namespace steppo::cuda {

// Tokens that a thread takes at once.
constexpr int kRewardTokens = 8;

// Where sums go. With `marks`, steps whose mark is 0 get none. `spanning` counts runs of steps that
// lie in several rows.
template <class T>
struct RewardSums {
  T* totals;
  const T* marks;
  unsigned* spanning;
};

// The end of a run as far as some tokens go: what they add to it, how many of them are of the step
// itself, and whether the run begins with one of them.
struct RunEnd {
  double sum;
  std::int32_t tokens;
  bool begins;
};

STEPPO_DEVICE RunEnd joined(const RunEnd& before, const RunEnd& end) {
  if (end.begins) return end;
  return {before.sum + end.sum, before.tokens + end.tokens, before.begins};
}

// The step of each of a thread's tokens, -1 where there is none, and what the token adds.
struct RewardTokens {
  std::int32_t ids[kRewardTokens];
  double rewards[kRewardTokens];
};

template <bool is_wide, class T>
STEPPO_DEVICE RewardTokens reward_tokens(const T* rewards, const Timeline& line, std::int64_t first,
                                         std::int64_t begin, std::int64_t end) {
  RewardTokens tokens;
  std::int32_t ids[kRewardTokens];
  T numbers[kRewardTokens];
  if (is_wide && first < end && first + kRewardTokens <= line.num_tokens) {
    load_wide(line.step_ids + first, ids);
    load_wide(rewards + first, numbers);
  } else {
#pragma unroll
    for (int k = 0; k < kRewardTokens; ++k) {
      const bool is_inside = first + k >= begin && first + k < end;
      ids[k] = is_inside ? line.step_ids[first + k] : -1;
      numbers[k] = is_inside ? rewards[first + k] : T(0);
    }
  }
#pragma unroll
  for (int k = 0; k < kRewardTokens; ++k) {
    const bool is_inside = first + k >= begin && first + k < end;
    tokens.ids[k] = is_inside ? ids[k] : -1;
    // A slot outside of actions may hold anything.
    const bool counts = is_inside && (ids[k] >= 0 || std::isfinite(numbers[k]));
    tokens.rewards[k] = counts ? static_cast<double>(numbers[k]) : 0.0;
  }
  return tokens;
}

// The sum over a lane and the `reach` lanes before it.
template <class N>
STEPPO_DEVICE N sum_of_lanes_before(N value, int reach) {
#pragma unroll
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const N other = __shfl_up_sync(kAllLanes, value, apart);
    if (apart <= reach) value += other;
  }
  return value;
}

// What the warps of a row tell each other about a tile.
template <int warps>
struct RewardRoom {
  std::int32_t latest[warps];
  RunEnd ends[warps];
};

STEPPO_DEVICE std::int32_t length_of(const Timeline& line, std::int32_t step) {
  if (step < 0) return 0;
  return static_cast<std::int32_t>(line.step_offsets[step + 1] - line.step_offsets[step]);
}

// Ends the run of a step of `length` tokens. A step that has all of its tokens there has this one
// writer; of another one, runs are only counted, and added where `adds`.
template <bool adds, class T>
STEPPO_DEVICE void end_run(const RewardSums<T>& out, std::int32_t step, std::int32_t length,
                           const RunEnd& run) {
  if (out.marks != nullptr && out.marks[step] == T(0)) return;
  if (run.tokens == length) {
    if (!adds) out.totals[step] = static_cast<T>(run.sum);
  } else if (adds) {
    out.totals[step] += static_cast<T>(run.sum);
  } else {
    atomicAdd(out.spanning, 1u);
  }
}

// Adds up a row, by `warps` warps that all come here.
template <int warps, bool is_wide, bool adds, class T>
STEPPO_DEVICE void add_row(const T* rewards, const Timeline& line, const RewardSums<T>& out,
                           std::int64_t row) {
  STEPPO_SHARED(RewardRoom<warps>, room);
  constexpr int kLanes = warps * kWarp;
  const int thread = threadIdx.x % kLanes, lane = thread % kWarp, warp = thread / kWarp;
  const unsigned lanes_before = (1u << lane) - 1;
  const std::int64_t begin = line.row_offsets[row], end = line.row_offsets[row + 1];
  // The step of the run that is open before the tile.
  std::int32_t open_step = -1;
  RunEnd open{};
  // Packs begin at multiples of 16 bytes.
  for (std::int64_t tile = begin / kRewardTokens * kRewardTokens; tile < end;
       tile += kLanes * kRewardTokens) {
    const RewardTokens tokens =
        reward_tokens<is_wide>(rewards, line, tile + thread * kRewardTokens, begin, end);
    // The latest step before the thread's tokens.
    std::int32_t latest = -1;
#pragma unroll
    for (int k = 0; k < kRewardTokens; ++k) latest = tokens.ids[k] >= 0 ? tokens.ids[k] : latest;
    const unsigned with_step = __ballot_sync(kAllLanes, latest >= 0);
    const unsigned before = with_step & lanes_before;
    std::int32_t step = __shfl_sync(kAllLanes, latest, before ? kWarp - 1 - __clz(before) : lane);
    std::int32_t next_open_step =
        __shfl_sync(kAllLanes, latest, with_step ? kWarp - 1 - __clz(with_step) : lane);
    std::int32_t step_before_warp = open_step;
    if constexpr (warps > 1) {
      if (lane == 0) room.latest[warp] = next_open_step;
      __syncthreads();
      next_open_step = -1;
      for (int w = 0; w < warps; ++w) {
        const std::int32_t of_warp = room.latest[w];
        if (of_warp < 0) continue;
        next_open_step = of_warp;
        if (w < warp) step_before_warp = of_warp;
      }
    }
    if (before == 0) step = step_before_warp;

    // The run that is open before the thread ends with its first token of another step. Runs that
    // begin and end within the thread are ended at once.
    RunEnd run{}, first_part{};
    std::int32_t first_step = -1;
    // How long the steps are whose runs end here: a load that comes before any store waits with the
    // others.
    std::int32_t lengths[kRewardTokens];
#pragma unroll
    for (int k = 0; k < kRewardTokens; ++k) lengths[k] = length_of(line, tokens.ids[k]);
    std::int32_t length = length_of(line, step), first_length = 0;
#pragma unroll
    for (int k = 0; k < kRewardTokens; ++k) {
      const std::int32_t id = tokens.ids[k];
      if (id >= 0 && step >= 0 && id != step) {
        if (run.begins) {
          end_run<adds>(out, step, length, run);
        } else {
          first_part = run;
          first_step = step;
          first_length = length;
        }
        run = {0, 0, true};
      }
      run.sum += tokens.rewards[k];
      if (id < 0) continue;
      run.tokens += 1;
      step = id;
      length = lengths[k];
    }

    // What the lanes before have of the run that is open before the thread.
    const unsigned beginning = __ballot_sync(kAllLanes, run.begins);
    const unsigned begun = beginning & (lanes_before << 1 | 1u);
    const int reach = begun ? lane - (kWarp - 1 - __clz(begun)) : lane;
    RunEnd mine{sum_of_lanes_before(run.sum, reach), sum_of_lanes_before(run.tokens, reach),
                begun != 0};
    RunEnd earlier{__shfl_up_sync(kAllLanes, mine.sum, 1),
                   __shfl_up_sync(kAllLanes, mine.tokens, 1), (beginning & lanes_before) != 0};
    if (lane == 0) earlier = {};
    RunEnd before_warp = open;
    const RunEnd of_warp{__shfl_sync(kAllLanes, mine.sum, kWarp - 1),
                         __shfl_sync(kAllLanes, mine.tokens, kWarp - 1), beginning != 0};
    if constexpr (warps > 1) {
      if (lane == 0) room.ends[warp] = of_warp;
      // The next tile's first barrier lies between what is read here and what it writes.
      __syncthreads();
      for (int w = 0; w < warps; ++w) {
        if (w == warp) before_warp = open;
        open = joined(open, room.ends[w]);
      }
    } else {
      open = joined(open, of_warp);
    }
    if (run.begins) {
      const RunEnd whole = joined(joined(before_warp, earlier), first_part);
      end_run<adds>(out, first_step, first_length, whole);
    }
    if (next_open_step >= 0) open_step = next_open_step;
  }
  if (thread == 0 && open_step >= 0) {
    end_run<adds>(out, open_step, length_of(line, open_step), open);
  }
}

// `warps` warps take a row. Totals are 0 before. Steps that lie in several rows, as layouts that
// were loaded may have them, get their sums from the last block, row by row.
template <class T, int warps, bool is_wide>
__global__ void __launch_bounds__(gae_threads<warps>, warps > 1 ? 1 : 2)
    rewards_kernel(const T* rewards, const Timeline line, T* totals, const T* marks,
                   Workspace* workspace) {
  constexpr int kRows = gae_threads<warps> / (warps * kWarp);
  const RewardSums<T> out{totals, marks, &workspace->counters[1]};
  const int group = threadIdx.x / (warps * kWarp);
  const std::int64_t row = std::int64_t{blockIdx.x} * kRows + group;
  if (row < line.num_rows) add_row<warps, is_wide, false>(rewards, line, out, row);
  // Any thread may have counted a run, and thread 0 tells others that the block has finished.
  __syncthreads();
  if (!is_last_block(&workspace->counters[0], gridDim.x)) return;
  // It also becomes 0 again.
  if (__syncthreads_count(threadIdx.x == 0 && atomicInc(out.spanning, 0) > 0) == 0) return;
  if (group > 0) return;
  for (std::int64_t each = 0; each < line.num_rows; ++each) {
    add_row<warps, is_wide, true>(rewards, line, out, each);
    // A row of a block begins with a barrier anyway, before anything of it is added.
    if constexpr (warps == 1) __syncwarp();
  }
}

template <class T>
void sum_rewards(const Launcher& launch, const T* rewards, const Timeline& line, T* totals,
                 const T* marks, Workspace* workspace) {
  const auto run = [&](auto narrow, auto wide, std::int64_t rows, int threads) {
    launch(is_wide(rewards) && is_wide(line.step_ids) ? wide : narrow,
           ceil_div(line.num_rows, rows), threads, rewards, line, totals, marks, workspace);
  };
  if (has_short_rows(line)) {
    run(listed<rewards_kernel<T, 1, false>>(), listed<rewards_kernel<T, 1, true>>(),
        gae_threads<1> / kWarp, gae_threads<1>);
  } else {
    run(listed<rewards_kernel<T, kLongWarps, false>>(),
        listed<rewards_kernel<T, kLongWarps, true>>(), 1, gae_threads<kLongWarps>);
  }
}

}  // namespace steppo::cuda
