// What the kernels of GAE share: blocks, trajectories, and advantages that are whitened last.
#pragma once

#include "launch.h"
#include "spread_merge.cuh"
#include "steppo/cuda.h"

namespace steppo::cuda {

// Warps that take a long trajectory, or a long row. A short one has a warp of a block of
// `kGaeThreads`.
constexpr int kLongWarps = 16, kGaeThreads = 256;
template <int warps>
constexpr int gae_threads = warps > 1 ? warps * kWarp : kGaeThreads;
// In the end a thread takes what a block has left.
constexpr std::int64_t kGaeBlocks = kGaeThreads;

// Whether a tile of a warp is a good part of a row.
inline bool has_short_rows(const Timeline& line) { return line.num_tokens <= 512 * line.num_rows; }

// Advantages that the last block whitens by itself; more of them are worth a launch.
constexpr std::int64_t kWhitenedAtOnce = 8192;
// Advantages that a thread loads before it stores the first of them. The last block has more
// registers for them, and others wait for it.
constexpr int kWhitenedTogether = 8, kWhitenedAtTheEnd = 16;

// The members of a trajectory; none behind the last one.
struct TrajectoryRange {
  std::int64_t begin, end;
};

STEPPO_DEVICE TrajectoryRange range_of(const Timeline& line, std::int64_t trajectory) {
  if (trajectory >= line.num_trajectories) return {0, 0};
  return {line.trajectory_offsets[trajectory], line.trajectory_offsets[trajectory + 1]};
}

// The spread of the numbers of a warp, by their distances from one of them. It is one of them,
// which bounds what is lost where the squares become those about the mean: they are no more than
// count + 1 times what is left. Equal numbers have none, to the last bit.
struct WarpSpread {
  // The same in all lanes. The others are a lane's own.
  bool has_near;
  double near;
  int count;
  double sum, squares;

  // Takes those of a lane's numbers that `has(k)` names. All lanes of a warp call it.
  template <class T, int most, class Has>
  STEPPO_MEMBER void take(const T (&numbers)[most], Has&& has) {
    if (!has_near) {
      bool is_some = false;
      T some = T(0);
#pragma unroll
      for (int k = 0; k < most; ++k) {
        if (!has(k)) continue;
        is_some = true;
        some = numbers[k];
      }
      const unsigned with_some = __ballot_sync(kAllLanes, is_some);
      if (with_some == 0) return;
      has_near = true;
      near =
          static_cast<double>(__shfl_sync(kAllLanes, some, __ffs(static_cast<int>(with_some)) - 1));
    }
#pragma unroll
    for (int k = 0; k < most; ++k) {
      if (!has(k)) continue;
      const double apart = static_cast<double>(numbers[k]) - near;
      sum += apart;
      squares += apart * apart;
      ++count;
    }
  }

  // That of all lanes, which all call it and get it.
  STEPPO_MEMBER Spread whole() const {
    if (!has_near) return {0, 0, 0};
    // Steps have 32-bit ids, so that there are no more of them.
    const double all = sum_of_lanes<kWarp>(count), apart = sum_of_lanes<kWarp>(sum);
    const double mean = apart / all;
    return {all, near + mean, sum_of_lanes<kWarp>(squares) - apart * mean};
  }
};

// Whitens the members first, first + stride, ...
template <int together, class T>
STEPPO_DEVICE void whiten_members(T* advantages, const Timeline& line, const Spread& spread,
                                  std::int64_t first, std::int64_t stride) {
  const Whitening by = whitening(spread);
  // If every step is a member, the order does not matter.
  const bool is_every = line.num_members == line.num_steps;
  for (std::int64_t k = first; k < line.num_members; k += together * stride) {
    T* places[together];
    T raw[together];
#pragma unroll
    for (int i = 0; i < together; ++i) {
      const std::int64_t member = k + i * stride;
      places[i] = nullptr;
      if (member >= line.num_members) continue;
      places[i] = advantages + (is_every ? member : line.trajectory_steps[member]);
      raw[i] = *places[i];
    }
#pragma unroll
    for (int i = 0; i < together; ++i) {
      if (places[i] == nullptr) continue;
      *places[i] = static_cast<T>(whitened(static_cast<double>(raw[i]), by));
    }
  }
}

// Where the last block leaves the spread to the launch behind it.
STEPPO_DEVICE Spread& spread_of(Workspace* workspace) {
  return *reinterpret_cast<Spread*>(workspace->partials);
}

template <class T>
__global__ void __launch_bounds__(kGaeThreads, 4)
    whiten_kernel(T* advantages, const Timeline line, Workspace* workspace) {
  whiten_members<kWhitenedTogether>(advantages, line, spread_of(workspace),
                                    std::int64_t{blockIdx.x} * kGaeThreads + threadIdx.x,
                                    std::int64_t{gridDim.x} * kGaeThreads);
}

// Whitens what a launch has computed, of which a warp knows the spread of its own: the last block
// does, or leaves the spread to `whiten_kernel`. All threads of all blocks call it.
template <int threads, class T>
STEPPO_DEVICE void finish_gae(T* advantages, const Timeline& line, const Spread& of_warp,
                              Workspace* workspace) {
  Spread whole;
  if (!spread_of_grid<threads>(workspace, of_warp, whole)) return;
  if (line.num_members <= kWhitenedAtOnce) {
    whiten_members<kWhitenedAtTheEnd>(advantages, line, whole, threadIdx.x, threads);
  } else if (threadIdx.x == 0) {
    spread_of(workspace) = whole;
  }
}

}  // namespace steppo::cuda
