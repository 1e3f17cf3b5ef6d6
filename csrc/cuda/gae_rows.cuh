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
struct alignas(16) Affine {
  double factor, sum;
};

STEPPO_DEVICE double image_of(const Affine& map, double x) { return map.sum + map.factor * x; }

// Makes `map` what it is after `before`; `least` is that of the factors.
STEPPO_DEVICE void put_before(const Affine& before, Affine& map, double least) {
  map.sum = image_of(map, before.sum);
  map.factor = times(map.factor, before.factor, least);
}

// A row of tokens.
struct RowOfSteps {
  std::int64_t begin, end;
  // The token that begins the first step.
  std::int64_t first;

  STEPPO_MEMBER bool has(std::int64_t token) const { return token >= begin && token < end; }
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
  // The id of the token before them.
  std::int32_t before;
  T rewards[kCount], values[kCount];

  // `from_values` is null where steps have values. Of a warp, the last lane alone loads `before`.
  STEPPO_MEMBER void load(const T* from_rewards, const T* from_values, const Timeline& line,
                          const RowOfSteps& row, bool is_wide, bool is_last_lane) {
    before = is_last_lane && row.has(begin - 1) ? line.step_ids[begin - 1] : -1;
    if (is_wide && begin >= row.begin && begin + kCount <= row.end) {
      load_wide(line.step_ids + begin, ids);
      load_wide(from_rewards + begin, rewards);
      if (from_values != nullptr) load_wide(from_values + begin, values);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const bool is_inside = row.has(begin + k);
        ids[k] = is_inside ? line.step_ids[begin + k] : -1;
        rewards[k] = is_inside ? from_rewards[begin + k] : T(0);
        values[k] = is_inside && from_values != nullptr ? from_values[begin + k] : T(0);
      }
    }
  }

  // Lanes get from their neighbours what is before their tokens. All lanes of a warp call it.
  STEPPO_MEMBER void meet(int lane) {
    const std::int32_t of_next = __shfl_down_sync(kAllLanes, ids[kCount - 1], 1);
    if (lane < kWarp - 1) before = of_next;
  }

  // Whether each of them begins a step. The numbers of a row's steps follow each other.
  STEPPO_MEMBER bool begins_all(const Timeline& line) const {
    if (ids[0] < 0 || ids[kCount - 1] - ids[0] != kCount - 1) return false;
    return before < 0 ? line.state_index[ids[0]] == begin : before != ids[0];
  }

  // Which of them begin a step, as bits.
  STEPPO_MEMBER unsigned begins(const Timeline& line) const {
    unsigned found = 0, asks = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const std::int32_t last = k > 0 ? ids[k - 1] : before;
      const bool is_behind_none = last < 0;
      if (ids[k] >= 0 && is_behind_none) asks |= 1u << k;
      if (ids[k] >= 0 && !is_behind_none && last != ids[k]) found |= 1u << k;
    }
    // Behind a token of no step, a step may begin or go on.
    if (asks != 0) {
      std::int64_t state[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        state[k] = (asks >> k & 1u) != 0 ? line.state_index[ids[k]] : -1;
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (state[k] == begin + k) found |= 1u << k;
      }
    }
    return found;
  }

  // Leaves out rewards that no step takes.
  STEPPO_MEMBER void leave_out() {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (ids[k] < 0 && !std::isfinite(rewards[k])) rewards[k] = T(0);
    }
  }

  // Gives the tokens that begin steps, or all of them, the values of these.
  template <bool is_every>
  STEPPO_MEMBER void take_values(unsigned begins, const T* of_steps) {
    if (is_every && is_wide(of_steps + ids[0])) {
      load_wide(of_steps + ids[0], values);
      return;
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (is_every || (begins >> k & 1u) != 0) values[k] = of_steps[ids[k]];
    }
  }
};

// gamma lam, its power over the tokens of a thread that each begin a step, and what `times` adds.
struct Powers {
  double decay, of_thread, least;
};

// What the steps have that begin in the tokens of a thread. Where each token begins one, as
// `is_every` says, nothing has to be asked of single ones.
template <class T>
struct RowSteps {
  static constexpr int kCount = kTokensOfRow<T>;

  // The tokens that begin them, as bits, and the step of each token.
  unsigned begins;
  std::int32_t ids[kCount];
  // By these tokens. An advantage is `delta` and decay times the one behind it.
  double delta[kCount], value[kCount];

  template <bool is_every>
  STEPPO_MEMBER bool has(int k) const {
    return is_every || (begins >> k & 1u) != 0;
  }

  // Returns what the tokens make of what they get from behind. `powers` are those of decay.
  template <bool is_every>
  STEPPO_MEMBER Affine take(const RowTokens<T>& tokens, double gamma, const Powers& powers) {
    Affine map{is_every ? powers.of_thread : 1, 0};
    double rewards = 0, next = 0;
#pragma unroll
    for (int k = kCount - 1; k >= 0; --k) {
      const double own = static_cast<double>(tokens.rewards[k]);
      rewards = is_every ? own : rewards + own;
      if (!has<is_every>(k)) continue;
      const bool is_latest = is_every && k == kCount - 1;
      value[k] = static_cast<double>(tokens.values[k]);
      delta[k] = is_latest ? rewards - value[k] : gamma * next + (rewards - value[k]);
      map.sum = is_latest ? delta[k] : delta[k] + powers.decay * map.sum;
      if (!is_every) map.factor = times(map.factor, powers.decay, powers.least);
      next = value[k];
      rewards = 0;
    }
    map.sum = (is_every ? gamma * next : gamma * next + rewards) + powers.decay * map.sum;
    return map;
  }

  // `lead` is what the first step of the row gets from before it.
  STEPPO_MEMBER void add_lead(std::int64_t place, double lead) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (place == k) delta[k] += lead;
    }
  }

  template <bool is_every>
  STEPPO_MEMBER void finish(double behind, double decay, T (&advantage)[kCount],
                            T (&value_return)[kCount]) const {
    double last = behind, factor = 1;
#pragma unroll
    for (int k = kCount - 1; k >= 0; --k) {
      if (!has<is_every>(k)) continue;
      last = delta[k] + factor * last;
      factor = decay;
      advantage[k] = static_cast<T>(last);
      value_return[k] = static_cast<T>(last + value[k]);
    }
  }
};

// A lane's part of the rewards of a row before its first step, which gets them.
template <int lanes, class T>
STEPPO_DEVICE double lead_of_lane(const T* rewards, const RowOfSteps& row) {
  double sum = 0;
#pragma unroll 4
  for (std::int64_t t = row.begin + threadIdx.x % lanes; t < row.first; t += lanes) {
    const T reward = rewards[t];
    if (std::isfinite(reward)) sum += static_cast<double>(reward);
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
  STEPPO_DEVICE unsigned place_of(unsigned number) { return number + number / kCount; }

  STEPPO_DEVICE Room& room_of_warp() {
    struct Rooms {
      Room of_warp[warps];
    };
    STEPPO_SHARED(Rooms, rooms);
    return rooms.of_warp[threadIdx.x / kWarp];
  }

  // All lanes of a warp call it. Where each has results for all of its tokens, these begin 32 bytes
  // apart, so that they are at multiples of 16 bytes in all lanes or in none.
  template <bool is_every>
  STEPPO_DEVICE void store(const RowSteps<T>& steps, const T (&advantage)[kCount],
                           const T (&value_return)[kCount], T* advantages, T* returns) {
    if (is_every && is_wide(advantages + steps.ids[0]) && is_wide(returns + steps.ids[0])) {
      store_wide(advantages + steps.ids[0], advantage);
      store_wide(returns + steps.ids[0], value_return);
      return;
    }
    if constexpr (warps == 1) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (!steps.template has<is_every>(k)) continue;
        advantages[steps.ids[k]] = advantage[k];
        returns[steps.ids[k]] = value_return[k];
      }
    } else {
      Room& room = room_of_warp();
      const unsigned lane = threadIdx.x % kWarp;
      const unsigned with_some = is_every ? kAllLanes : __ballot_sync(kAllLanes, steps.begins != 0);
      if (with_some == 0) return;
      std::int32_t lowest = 0;
#pragma unroll
      for (int k = kCount - 1; k >= 0; --k) {
        if (steps.template has<is_every>(k)) lowest = steps.ids[k];
      }
      const std::int32_t end = lowest + (is_every ? kCount : __popc(steps.begins));
      // The last lane has what is earliest in the row.
      const std::int32_t first =
          __shfl_sync(kAllLanes, lowest, kWarp - 1 - __clz(static_cast<int>(with_some)));
      const unsigned count =
          is_every ? kWarp * kCount
                   : __shfl_sync(kAllLanes, end, __ffs(static_cast<int>(with_some)) - 1) - first;
      const unsigned own_place = (kWarp - 1 - lane) * (kCount + 1);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (!steps.template has<is_every>(k)) continue;
        const unsigned place = is_every ? own_place + k : place_of(steps.ids[k] - first);
        room.advantages[place] = advantage[k];
        room.returns[place] = value_return[k];
      }
      // A barrier of the next tile lies before it writes to what is read here.
      __syncwarp();
      const T* const from_advantages = room.advantages + place_of(lane);
      const T* const from_returns = room.returns + place_of(lane);
      advantages += first + std::int64_t{lane};
      returns += first + std::int64_t{lane};
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (k * kWarp + lane >= count) continue;
        advantages[k * kWarp] = from_advantages[place_of(k * kWarp)];
        returns[k * kWarp] = from_returns[place_of(k * kWarp)];
      }
    }
  }
};

// `warps` warps take a row from its end. The first thread has the latest tokens.
template <class T, int warps>
__global__ void __launch_bounds__(gae_threads<warps>, warps > 1 ? 1 : 2)
    gae_rows_kernel(const GaeTensors tensors, const Timeline line, const GaeConfig config,
                    bool is_wide, Workspace* workspace) {
  // What the warps of a block tell each other in a tile.
  struct Room {
    // Before those of the warps are as many that change nothing: each warp applies `warps` - 1.
    Affine maps[2 * warps - 1];
    double lead_of_warp[warps];
    // What the tile gets from behind it.
    double behind;
  };
  struct Rooms {
    Room of_tile[2];
  };
  STEPPO_SHARED(Rooms, rooms);
  constexpr int kOwn = gae_threads<warps>, kLanes = warps * kWarp, kGroups = kOwn / kLanes;
  constexpr int kTokens = kTokensOfRow<T>, kTile = kLanes * kTokens;
  const T* const rewards = static_cast<const T*>(tensors.rewards);
  const T* const given = static_cast<const T*>(tensors.values);
  const T* const values = tensors.values_per_token ? given : nullptr;
  const T* const bootstrap = static_cast<const T*>(tensors.bootstrap_values);
  T* const advantages = static_cast<T*>(tensors.advantages);
  T* const returns = static_cast<T*>(tensors.returns);
  const int thread = threadIdx.x % kLanes, lane = thread % kWarp, warp = thread / kWarp;
  const double decay = config.gamma * config.lam, least = least_power(decay);
  const Powers powers{decay, power(decay, kTokens, least), least};
  WarpSpread spread{};
  if (warps > 1 && thread < 2 * (warps - 1)) {
    rooms.of_tile[thread % 2].maps[thread / 2] = {1, 0};
  }
  // The room of a tile is not that of the next one, and a barrier of that lies before the one after
  // it writes to what has been read.
  int turn = 0;
  const std::int64_t stride = std::int64_t{gridDim.x} * kGroups;
  for (std::int64_t g = std::int64_t{blockIdx.x} * kGroups + threadIdx.x / kLanes;
       g < line.num_trajectories; g += stride) {
    RowOfSteps row{line.row_offsets[g], line.row_offsets[g + 1], 0};
    const TrajectoryRange members = range_of(line, g);
    if (members.begin == members.end) continue;
    const std::int64_t first_step = line.trajectory_steps[members.begin];
    double carry = 0;
    if (bootstrap != nullptr) carry = config.gamma * static_cast<double>(bootstrap[g]);
    // Packs begin at multiples of 16 bytes.
    const std::int64_t top = (row.end + kTokens - 1) / kTokens * kTokens;
    RowTokens<T> tokens;
    tokens.begin = top - (thread + 1) * kTokens;
    tokens.load(rewards, values, line, row, is_wide, lane == kWarp - 1);
    // The latest tokens are under way while it is looked for.
    row.first = line.state_index[first_step];
    bool is_last = false;
    for (std::int64_t tile = top; !is_last; tile -= kTile, turn ^= 1) {
      tokens.meet(lane);
      const bool is_every = __all_sync(kAllLanes, tokens.begins_all(line));
      RowSteps<T> steps{};
      Affine map;
      if (is_every) {
        steps.begins = (1u << kTokens) - 1;
        if (values == nullptr) tokens.template take_values<true>(steps.begins, given);
        map = steps.template take<true>(tokens, config.gamma, powers);
      } else {
        steps.begins = tokens.begins(line);
        tokens.leave_out();
        if (values == nullptr) tokens.template take_values<false>(steps.begins, given);
        map = steps.template take<false>(tokens, config.gamma, powers);
      }
#pragma unroll
      for (int apart = 1; apart < kWarp; apart *= 2) {
        const Affine other{__shfl_up_sync(kAllLanes, map.factor, apart),
                           __shfl_up_sync(kAllLanes, map.sum, apart)};
        if (lane >= apart) put_before(other, map, powers.least);
      }
#pragma unroll
      for (int k = 0; k < kTokens; ++k) steps.ids[k] = tokens.ids[k];
      const std::int64_t begin = tokens.begin;
      is_last = tile - kTile <= row.first;
      if (!is_last) {
        // The next tile is on its way while the results of this one are computed.
        tokens.begin -= kTile;
        tokens.load(rewards, values, line, row, is_wide, lane == kWarp - 1);
      }
      const bool has_lead = is_last && row.first > row.begin;
      double lead = 0;
      if (has_lead) lead = sum_of_lanes<kWarp>(lead_of_lane<kLanes>(rewards, row));
      double behind = carry;
      Room& room = rooms.of_tile[turn];
      if constexpr (warps > 1) {
        if (lane == kWarp - 1) {
          room.maps[warps - 1 + warp] = map;
          room.lead_of_warp[warp] = lead;
        }
        if (thread == 0 && tile == top) room.behind = carry;
        __syncthreads();
        behind = room.behind;
#pragma unroll
        for (int w = 0; w < warps - 1; ++w) behind = image_of(room.maps[warp + w], behind);
      }
      const double image = image_of(map, behind);
      if constexpr (warps > 1) {
        if (thread == kLanes - 1 && !is_last) rooms.of_tile[turn ^ 1].behind = image;
      } else {
        carry = __shfl_sync(kAllLanes, image, kWarp - 1);
      }
      const double image_behind = __shfl_up_sync(kAllLanes, image, 1);
      if (lane > 0) behind = image_behind;
      if (has_lead && row.first >= begin && row.first < begin + kTokens) {
        if constexpr (warps > 1) {
          lead = 0;
          for (int w = 0; w < warps; ++w) lead += room.lead_of_warp[w];
        }
        steps.add_lead(row.first - begin, lead);
      }
      // What is whitened later is the rounded one: less its own mean it must come out as 0.
      T rounded[kTokens]{}, value_return[kTokens]{};
      using Results = RowResults<T, warps>;
      if (is_every) {
        steps.template finish<true>(behind, decay, rounded, value_return);
        Results::template store<true>(steps, rounded, value_return, advantages, returns);
        if (config.whiten) spread.take(rounded, [](int) { return true; });
      } else {
        steps.template finish<false>(behind, decay, rounded, value_return);
        Results::template store<false>(steps, rounded, value_return, advantages, returns);
        if (config.whiten) {
          spread.take(rounded, [&](int k) { return steps.template has<false>(k); });
        }
      }
    }
  }
  if (config.whiten) finish_gae<kOwn>(advantages, line, spread.whole(), workspace);
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
