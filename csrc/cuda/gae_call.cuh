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

// The spread of a thread's numbers, by their distances from one of them, which
// bounds what is lost where the squares are made those about the mean: `squares` is no more than
// count + 1 times what is left. Equal numbers have none, to the last bit.
struct OwnSpread {
  double first, sum, squares;
  int count;

  // Takes those of some numbers that `has(k)` names.
  template <class T, int most, class Has>
  STEPPO_MEMBER void take(const T (&numbers)[most], Has&& has) {
    if (count == 0) {
#pragma unroll
      for (int k = 0; k < most; ++k) {
        if (has(k)) first = static_cast<double>(numbers[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < most; ++k) {
      if (!has(k)) continue;
      const double apart = static_cast<double>(numbers[k]) - first;
      sum += apart;
      squares += apart * apart;
      ++count;
    }
  }

  STEPPO_MEMBER Spread whole() const {
    if (count == 0) return {0, 0, 0};
    const double mean = sum / count;
    return {static_cast<double>(count), first + mean, squares - sum * mean};
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

// Whitens what a launch has computed, of which a thread knows the spread of its own: the last block
// does, or leaves the spread to `whiten_kernel`. All threads of all blocks call it.
template <int threads, class T>
STEPPO_DEVICE void finish_gae(T* advantages, const Timeline& line, const Spread& own,
                              Workspace* workspace) {
  Spread whole;
  if (!spread_of_grid<threads>(workspace, own, whole)) return;
  if (line.num_members <= kWhitenedAtOnce) {
    whiten_members<kWhitenedAtTheEnd>(advantages, line, whole, threadIdx.x, threads);
  } else if (threadIdx.x == 0) {
    spread_of(workspace) = whole;
  }
}

}  // namespace steppo::cuda
