// GAE along the rows of a batch, whose trajectories they are: one launch reads the rewards of
// tokens, and the values of tokens beside them or those of steps.
//
// A row is read from its end. X is what a step gets from behind it: the rewards of the tokens that
// it owns there, and of the step after it gamma V + gamma lam A. A token that begins no step adds
// its reward to X. One that begins a step has A = r - V + X, and X becomes gamma V + gamma lam A.
// Each is an affine map of X, and those of many tokens are one.
#pragma once

#include <algorithm>
#include <cmath>

#include "decay.cuh"
#include "fill.cuh"
#include "gae_call.cuh"

namespace steppo::cuda {

// X -> sum + factor X.
struct Affine {
  double factor, sum;
};

STEPPO_DEVICE double image_of(const Affine& map, double x) { return map.sum + map.factor * x; }

// `map` after `before`.
STEPPO_DEVICE Affine after(const Affine& map, const Affine& before) {
  return {times(map.factor, before.factor), image_of(map, before.sum)};
}

// A row of tokens.
struct RowOfSteps {
  std::int64_t begin, end;
  // The token that begins the first step.
  std::int64_t first;
};

// Tokens that a thread takes at once.
template <class T>
constexpr int kTokensOfRow = 32 / sizeof(T);

// Tokens of a row that follow each other; none of a step outside of it.
template <class T>
struct RowTokens {
  static constexpr int kCount = kTokensOfRow<T>;

  std::int64_t begin;
  std::int32_t ids[kCount];
  T rewards[kCount], values[kCount];

  // `from_values` is null where steps have values.
  STEPPO_MEMBER void load(const T* from_rewards, const T* from_values, const Timeline& line,
                          const RowOfSteps& row, bool is_wide) {
    const bool is_any = begin < row.end && begin + kCount > row.begin;
    if (is_wide && is_any && begin + kCount <= line.num_tokens) {
      load_wide(line.step_ids + begin, ids);
      load_wide(from_rewards + begin, rewards);
      if (from_values != nullptr) load_wide(from_values + begin, values);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const bool is_inside = begin + k >= row.begin && begin + k < row.end;
        ids[k] = is_inside ? line.step_ids[begin + k] : -1;
        rewards[k] = is_inside ? from_rewards[begin + k] : T(0);
        values[k] = is_inside && from_values != nullptr ? from_values[begin + k] : T(0);
      }
    }
  }

  // Asks for the memory of the tokens that are so many before these.
  STEPPO_MEMBER void prefetch_before(std::int64_t apart, const T* from_rewards,
                                     const T* from_values, const Timeline& line,
                                     const RowOfSteps& row) const {
    const std::int64_t there = begin - apart;
    if (there < row.first) return;
    prefetch(line.step_ids + there);
    prefetch(from_rewards + there);
    if (from_values != nullptr) prefetch(from_values + there);
  }

  // Leaves out what is of other rows, and what no step takes.
  STEPPO_MEMBER void narrow(const RowOfSteps& row) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const bool is_inside = begin + k >= row.begin && begin + k < row.end;
      if (!is_inside) ids[k] = -1;
      if (!is_inside || (ids[k] < 0 && !std::isfinite(rewards[k]))) rewards[k] = T(0);
    }
  }

  // Which of them begin a step, as bits. `before` is the id of the token before them.
  STEPPO_MEMBER unsigned begins(const Timeline& line, std::int32_t before) const {
    // Behind a token of no step, a step may begin or go on.
    std::int64_t state[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const bool asks = ids[k] >= 0 && (k > 0 ? ids[k - 1] : before) < 0;
      state[k] = asks ? line.state_index[ids[k]] : -1;
    }
    unsigned found = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const std::int32_t last = k > 0 ? ids[k - 1] : before;
      const bool is_begin = ids[k] >= 0 && (last < 0 ? state[k] == begin + k : last != ids[k]);
      found |= static_cast<unsigned>(is_begin) << k;
    }
    return found;
  }
};

// Gives the tokens that begin steps the values of these.
template <class T>
STEPPO_DEVICE void take_values(RowTokens<T>& tokens, unsigned begins, const T* of_steps) {
#pragma unroll
  for (int k = 0; k < RowTokens<T>::kCount; ++k) {
    if ((begins >> k & 1u) != 0) tokens.values[k] = of_steps[tokens.ids[k]];
  }
}

// The sum of the rewards of a row before its first step, which gets them. All lanes of the row call
// it and get it.
template <int warps, class T>
STEPPO_DEVICE double rewards_before(const T* rewards, const RowOfSteps& row) {
  if (row.first == row.begin) return 0;
  constexpr int kLanes = warps * kWarp;
  struct Room {
    double of_warp[warps];
  };
  STEPPO_SHARED(Room, room);
  double sum = 0;
#pragma unroll 4
  for (std::int64_t t = row.begin + threadIdx.x % kLanes; t < row.first; t += kLanes) {
    const T reward = rewards[t];
    if (std::isfinite(reward)) sum += static_cast<double>(reward);
  }
  sum = sum_of_lanes<kWarp>(sum);
  if constexpr (warps > 1) {
    if (threadIdx.x % kWarp == 0) room.of_warp[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = 0;
    // The barriers of a tile lie before the next row writes to it.
    for (int w = 0; w < warps; ++w) sum += room.of_warp[w];
  }
  return sum;
}

// Where the results of a tile go. Steps that begin in the tokens of a warp have numbers that follow
// each other, so that its lanes can exchange them and store side by side.
template <class T, int warps>
struct RowResults {
  static constexpr int kCount = kTokensOfRow<T>;
  struct Room {
    T advantages[kWarp * (kCount + 1)], returns[kWarp * (kCount + 1)];
  };

  // Places of neighbouring lanes lie in different banks.
  STEPPO_DEVICE int place_of(int number) { return number + number / kCount; }

  // All lanes of a warp call it. `begins` are the bits of the tokens that have results.
  STEPPO_DEVICE void store(const RowTokens<T>& tokens, unsigned begins,
                           const T (&advantage)[kCount], const T (&value_return)[kCount],
                           T* advantages, T* returns) {
    if constexpr (warps == 1) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if ((begins >> k & 1u) == 0) continue;
        advantages[tokens.ids[k]] = advantage[k];
        returns[tokens.ids[k]] = value_return[k];
      }
    } else {
      struct Rooms {
        Room of_warp[warps];
      };
      STEPPO_SHARED(Rooms, rooms);
      Room& room = rooms.of_warp[threadIdx.x / kWarp];
      const int lane = threadIdx.x % kWarp;
      const unsigned with_some = __ballot_sync(kAllLanes, begins != 0);
      if (with_some == 0) return;
      std::int32_t lowest = 0;
#pragma unroll
      for (int k = kCount - 1; k >= 0; --k) {
        if ((begins >> k & 1u) != 0) lowest = tokens.ids[k];
      }
      // The last lane has what is earliest in the row.
      lowest = __shfl_sync(kAllLanes, lowest, kWarp - 1 - __clz(static_cast<int>(with_some)));
      const int count = sum_of_lanes<kWarp>(__popc(begins));
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if ((begins >> k & 1u) == 0) continue;
        const int place = place_of(tokens.ids[k] - lowest);
        room.advantages[place] = advantage[k];
        room.returns[place] = value_return[k];
      }
      // The barriers of the next tile lie before it writes to what is read here.
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int number = k * kWarp + lane;
        if (number >= count) continue;
        advantages[lowest + number] = room.advantages[place_of(number)];
        returns[lowest + number] = room.returns[place_of(number)];
      }
    }
  }
};

// `warps` warps take a row from its end. The first thread has the latest tokens.
template <class T, int warps>
__global__ void __launch_bounds__(gae_threads<warps>, warps > 1 ? 1 : 2)
    gae_rows_kernel(const GaeTensors tensors, const Timeline line, const GaeConfig config,
                    bool is_wide, Workspace* workspace) {
  struct Room {
    Affine of_warp[warps];
  };
  STEPPO_SHARED(Room, room);
  constexpr int kOwn = gae_threads<warps>, kLanes = warps * kWarp, kGroups = kOwn / kLanes;
  constexpr int kTokens = kTokensOfRow<T>;
  const T* const rewards = static_cast<const T*>(tensors.rewards);
  const T* const given = static_cast<const T*>(tensors.values);
  const T* const values = tensors.values_per_token ? given : nullptr;
  const T* const bootstrap = static_cast<const T*>(tensors.bootstrap_values);
  T* const advantages = static_cast<T*>(tensors.advantages);
  T* const returns = static_cast<T*>(tensors.returns);
  const int thread = threadIdx.x % kLanes, lane = thread % kWarp, warp = thread / kWarp;
  const double decay = config.gamma * config.lam;
  Spread spread{};
  const std::int64_t stride = std::int64_t{gridDim.x} * kGroups;
  for (std::int64_t g = std::int64_t{blockIdx.x} * kGroups + threadIdx.x / kLanes;
       g < line.num_trajectories; g += stride) {
    RowOfSteps row{line.row_offsets[g], line.row_offsets[g + 1], 0};
    const TrajectoryRange members = range_of(line, g);
    if (members.begin == members.end) continue;
    // Packs begin at multiples of 16 bytes. The latest are under way while the first is looked for.
    const std::int64_t top = (row.end + kTokens - 1) / kTokens * kTokens;
    RowTokens<T> tokens;
    tokens.begin = top - (thread + 1) * kTokens;
    tokens.load(rewards, values, line, row, is_wide);
    row.first = line.state_index[line.trajectory_steps[members.begin]];
    const double lead = rewards_before<warps>(rewards, row);
    double carry = bootstrap == nullptr ? 0.0 : config.gamma * static_cast<double>(bootstrap[g]);
    for (std::int64_t tile = top; tile > row.first; tile -= kLanes * kTokens) {
      if (tile != top) {
        tokens.begin = tile - (thread + 1) * kTokens;
        tokens.load(rewards, values, line, row, is_wide);
      }
      // The next tile is on its way while this one is computed.
      tokens.prefetch_before(kLanes * kTokens, rewards, values, line, row);
      tokens.narrow(row);
      std::int32_t before = __shfl_down_sync(kAllLanes, tokens.ids[kTokens - 1], 1);
      if (lane == kWarp - 1) {
        // Without it, this lane would have to look where its step begins.
        const std::int64_t at = tokens.begin - 1;
        before = at >= row.begin && at < row.end ? line.step_ids[at] : -1;
      }
      const unsigned begins = tokens.begins(line, before);
      if (values == nullptr) take_values(tokens, begins, given);
      const auto reward_of = [&](int k) {
        const double own = static_cast<double>(tokens.rewards[k]);
        return tokens.begin + k == row.first ? own + lead : own;
      };
      Affine map{1, 0};
#pragma unroll
      for (int k = kTokens - 1; k >= 0; --k) {
        if ((begins >> k & 1u) != 0) {
          const double value = static_cast<double>(tokens.values[k]);
          map = {times(decay, map.factor),
                 config.gamma * value + decay * (reward_of(k) - value + map.sum)};
        } else {
          map.sum += reward_of(k);
        }
      }
#pragma unroll
      for (int apart = 1; apart < kWarp; apart *= 2) {
        const Affine other{__shfl_up_sync(kAllLanes, map.factor, apart),
                           __shfl_up_sync(kAllLanes, map.sum, apart)};
        if (lane >= apart) map = after(map, other);
      }
      const Affine before_lane{__shfl_up_sync(kAllLanes, map.factor, 1),
                               __shfl_up_sync(kAllLanes, map.sum, 1)};
      const Affine of_warp{__shfl_sync(kAllLanes, map.factor, kWarp - 1),
                           __shfl_sync(kAllLanes, map.sum, kWarp - 1)};
      double behind = carry;
      if constexpr (warps > 1) {
        if (lane == 0) room.of_warp[warp] = of_warp;
        __syncthreads();
        for (int w = 0; w < warps; ++w) {
          if (w == warp) behind = carry;
          carry = image_of(room.of_warp[w], carry);
        }
        // The next tile writes to what has been read here.
        __syncthreads();
      } else {
        carry = image_of(of_warp, carry);
      }
      if (lane > 0) behind = image_of(before_lane, behind);
      // What is whitened later is the rounded one: less its own mean it must come out as 0.
      T rounded[kTokens]{}, value_return[kTokens]{}, near = T(0);
#pragma unroll
      for (int k = kTokens - 1; k >= 0; --k) {
        if ((begins >> k & 1u) != 0) {
          const double value = static_cast<double>(tokens.values[k]);
          const double advantage = reward_of(k) - value + behind;
          near = rounded[k] = static_cast<T>(advantage);
          value_return[k] = static_cast<T>(advantage + value);
          behind = config.gamma * value + decay * advantage;
        } else {
          behind += reward_of(k);
        }
      }
      RowResults<T, warps>::store(tokens, begins, rounded, value_return, advantages, returns);
      if (config.whiten) {
        merge(spread, spread_of_tile(rounded, __popc(begins), near,
                                     [&](int k) { return (begins >> k & 1u) != 0; }));
      }
    }
  }
  if (config.whiten) finish_gae<kOwn>(advantages, line, spread, workspace);
}

template <class T>
void gae_of_rows(const Launcher& launch, const GaeTensors& tensors, const Timeline& line,
                 const GaeConfig& config, Workspace* workspace) {
  if (line.num_members != line.num_steps) {
    fill_with_zeros(launch, static_cast<T*>(tensors.advantages), line.num_steps);
    fill_with_zeros(launch, static_cast<T*>(tensors.returns), line.num_steps);
  }
  const bool is_short = has_short_rows(line);
  const bool wide = is_wide(tensors.rewards) && is_wide(line.step_ids) &&
                    (!tensors.values_per_token || is_wide(tensors.values));
  launch(is_short ? listed<gae_rows_kernel<T, 1>>() : listed<gae_rows_kernel<T, kLongWarps>>(),
         std::min(ceil_div(line.num_rows, is_short ? kGaeThreads / kWarp : 1),
                  most_blocks(kGaeBlocks)),
         is_short ? gae_threads<1> : gae_threads<kLongWarps>, tensors, line, config, wide,
         workspace);
}

}  // namespace steppo::cuda
