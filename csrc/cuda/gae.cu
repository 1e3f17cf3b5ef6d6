// Step-level GAE: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1},
// R_t = A_t + V_t over the steps of each trajectory (StepPO, arXiv 2604.18401, section 3).
#include <algorithm>
#include <type_traits>

#include "decay.cuh"
#include "fill.cuh"
#include "gae_call.cuh"
#include "gae_rows.cuh"
#include "gae_tile.cuh"
#include "step_rewards.cuh"

namespace steppo::cuda {
namespace {

// Steps that a thread takes at once: a tile, whose loads wait for each other once. A short
// trajectory is one or two tiles of a warp, and a long one a few of a block, for whose exchange
// shared memory has room.
constexpr int kShortSteps = 4;
template <class T>
constexpr int kLongSteps = 32 / sizeof(T);

// Marks what is a step of a trajectory.
template <class T>
__global__ void __launch_bounds__(kGaeThreads, 4)
    mark_kernel(const std::int64_t* trajectory_steps, std::int64_t num_members, T* marks) {
  const std::int64_t k = std::int64_t{blockIdx.x} * kGaeThreads + threadIdx.x;
  if (k < num_members) marks[trajectory_steps[k]] = T(1);
}

// A warp's tile, with its room in shared memory where it needs one.
template <class Tile, int warps>
STEPPO_DEVICE Tile tile_of_warp() {
  if constexpr (warps > 1) {
    struct Rooms {
      typename Tile::Room of_warp[warps];
    };
    STEPPO_SHARED(Rooms, rooms);
    return Tile{rooms.of_warp[threadIdx.x / kWarp], {}};
  } else {
    return Tile{};
  }
}

// `warps` warps take a trajectory from its end, `steps` steps a thread at once: a thread has the
// steps before, in time, those of the thread before it. `rewards` may be the returns themselves: an
// entry is read before it is written.
template <class T, int warps, int steps>
__global__ void __launch_bounds__(gae_threads<warps>, warps > 1 ? 1 : 2)
    gae_kernel(const GaeTensors tensors, const Timeline line, const GaeConfig config,
               const T* rewards, Workspace* workspace) {
  struct Room {
    double of_warp[warps];
  };
  STEPPO_SHARED(Room, room);
  using Tile = std::conditional_t<(warps > 1), SharedTile<T, steps>, OwnTile<T, steps>>;
  constexpr int kOwn = gae_threads<warps>, kLanes = warps * kWarp, kGroups = kOwn / kLanes;
  const T* const bootstrap = static_cast<const T*>(tensors.bootstrap_values);
  T* const advantages = static_cast<T*>(tensors.advantages);
  T* const returns = static_cast<T*>(tensors.returns);
  const int thread = threadIdx.x % kLanes, lane = thread % kWarp, warp = thread / kWarp;
  std::int64_t g = std::int64_t{blockIdx.x} * kGroups + threadIdx.x / kLanes;
  // Where its steps lie is under way while the factors are multiplied.
  TrajectoryRange range = range_of(line, g);
  const double decay = config.gamma * config.lam, least = least_power(decay);
  const double over_thread = power(decay, steps, least);
  const double to_lane = power(over_thread, lane, least);
  GaeSource<T> source{nullptr, 0, tensors.values_per_token ? line.state_index : nullptr,
                      static_cast<const T*>(tensors.values), rewards};
  Tile tile = tile_of_warp<Tile, warps>();
  WarpSpread spread{};
  const std::int64_t stride = std::int64_t{gridDim.x} * kGroups;
  for (; g < line.num_trajectories; g += stride, range = range_of(line, g)) {
    source.members = line.trajectory_steps + range.begin;
    // Steps have 32-bit ids, so that there are no more of them.
    source.length = static_cast<int>(range.end - range.begin);
    double carry = 0;
    for (int left = source.length; left > 0; left -= kLanes * steps) {
      GaeNumbers<T, steps> of = tile.load(source, left - 1 - warp * kWarp * steps, lane);
      if (left == source.length && thread == 0 && bootstrap != nullptr) of.value[0] = bootstrap[g];
      // How many of the thread's steps there are.
      const int count = left - thread * steps < steps ? left - thread * steps : steps;
      double delta[steps];
      double sum = 0;
#pragma unroll
      for (int k = 0; k < steps; ++k) {
        delta[k] = 0;
        if (k < count) {
          delta[k] = static_cast<double>(of.reward[k]) +
                     config.gamma * static_cast<double>(of.value[k]) -
                     static_cast<double>(of.value[k + 1]);
        }
        sum = delta[k] + decay * sum;
      }
      // The advantage of the thread's earliest step, as far as the steps of the warp tell.
      double over_lanes = over_thread;
#pragma unroll
      for (int apart = 1; apart < kWarp; apart *= 2) {
        const double other = __shfl_up_sync(kAllLanes, sum, apart);
        if (lane >= apart) sum += over_lanes * other;
        over_lanes = times(over_lanes, over_lanes, least);
      }
      double advantage = __shfl_up_sync(kAllLanes, sum, 1);
      const double of_warp = __shfl_sync(kAllLanes, sum, kWarp - 1);
      double before_warp = carry;
      if constexpr (warps > 1) {
        if (lane == 0) room.of_warp[warp] = of_warp;
        __syncthreads();
        for (int w = 0; w < warps; ++w) {
          if (w == warp) before_warp = carry;
          carry = room.of_warp[w] + over_lanes * carry;
        }
        // The next tile writes to what has been read here.
        __syncthreads();
      } else {
        carry = of_warp + over_lanes * carry;
      }
      advantage = lane == 0 ? before_warp : advantage + to_lane * before_warp;
      // What is whitened later is the rounded one: less its own mean it must come out as 0.
      T rounded[steps], value_return[steps];
#pragma unroll
      for (int k = 0; k < steps; ++k) {
        advantage = delta[k] + decay * advantage;
        rounded[k] = static_cast<T>(advantage);
        value_return[k] = static_cast<T>(advantage + static_cast<double>(of.value[k + 1]));
      }
      tile.store(rounded, value_return, advantages, returns, lane);
      if (config.whiten) spread.take(rounded, [&](int k) { return k < count; });
    }
  }
  if (config.whiten) finish_gae<kOwn>(advantages, line, spread.whole(), workspace);
}

// Where steps lie anywhere: rewards of tokens are first added up by step.
template <class T>
void gae_of_steps(const Launcher& launch, const GaeTensors& tensors, const Timeline& line,
                  const GaeConfig& config, Workspace* workspace) {
  const std::int64_t num_steps = line.num_steps, num_members = line.num_members;
  T* const advantages = static_cast<T*>(tensors.advantages);
  T* const returns = static_cast<T*>(tensors.returns);
  const T* rewards = static_cast<const T*>(tensors.rewards);
  // Launches of their own come before: no block knows which steps others write to.
  const bool is_every = num_members == num_steps;
  if (!is_every) fill_with_zeros(launch, advantages, num_steps);
  if (!is_every || tensors.rewards_per_token) fill_with_zeros(launch, returns, num_steps);
  if (tensors.rewards_per_token) {
    // A step of no trajectory keeps its 0. Advantages are where there is room for marks.
    if (!is_every) {
      launch(listed<mark_kernel<T>>(), ceil_div(num_members, kGaeThreads), kGaeThreads,
             line.trajectory_steps, num_members, advantages);
    }
    sum_rewards(launch, rewards, line, returns, is_every ? nullptr : advantages, workspace);
    rewards = returns;
  }
  const bool is_short = num_members <= 2 * kWarp * kShortSteps * line.num_trajectories;
  const std::int64_t blocks = ceil_div(line.num_trajectories, is_short ? kGaeThreads / kWarp : 1);
  launch(is_short ? listed<gae_kernel<T, 1, kShortSteps>>()
                  : listed<gae_kernel<T, kLongWarps, kLongSteps<T>>>(),
         std::min(blocks, most_blocks(kGaeBlocks)),
         is_short ? gae_threads<1> : gae_threads<kLongWarps>, tensors, line, config, rewards,
         workspace);
}

}  // namespace

void step_gae(const GaeTensors& tensors, const Timeline& line, const GaeConfig& config,
              const Place& place) {
  const Launcher launch("step_gae", place);
  Workspace* const workspace = static_cast<Workspace*>(place.workspace);
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (tensors.along_rows && tensors.rewards_per_token) {
      gae_of_rows<T>(launch, tensors, line, config, workspace);
    } else {
      gae_of_steps<T>(launch, tensors, line, config, workspace);
    }
    if (config.whiten && line.num_members > kWhitenedAtOnce) {
      launch(listed<whiten_kernel<T>>(),
             ceil_div(line.num_members, kWhitenedTogether * kGaeThreads), kGaeThreads,
             static_cast<T*>(tensors.advantages), line, workspace);
    }
  });
}

}  // namespace steppo::cuda
