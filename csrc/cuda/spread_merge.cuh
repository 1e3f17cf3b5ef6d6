// Merges the spreads of warps and of blocks, in a fixed order. Many at once have one mean, and
// divide once for it.
#pragma once

#include "last_block.cuh"
#include "steppo/spread.h"

namespace steppo::cuda {

// The spread of the numbers of `lanes` neighbouring lanes, a power of 2; each of them gets it. All
// lanes of a warp call it, and each group of them has the same numbers. That of equal ones is 0, to
// the last bit.
template <int lanes>
STEPPO_DEVICE Spread spread_of_lanes(const Spread& own) {
  const unsigned with_some = __ballot_sync(kAllLanes, own.count > 0);
  if (with_some == 0) return Spread{};
  const bool is_some = own.count > 0;
  const int first = __ffs(static_cast<int>(with_some)) - 1;
  const double near = __shfl_sync(kAllLanes, own.mean, first);
  const double count = sum_of_lanes<lanes>(own.count);
  const double apart = sum_of_lanes<lanes>(is_some ? own.count * (own.mean - near) : 0.0);
  const double mean = near + apart / count;
  const double rest = own.mean - mean;
  const double squares = is_some ? own.squares + own.count * (rest * rest) : 0.0;
  return {count, mean, sum_of_lanes<lanes>(squares)};
}

// The spread of the numbers of all warps of a block, of which each has that of its own. All threads
// of the block call it and get it. A barrier has to lie between two calls.
template <int threads>
STEPPO_DEVICE Spread spread_of_block(const Spread& of_warp) {
  constexpr int kWarps = threads / kWarp;
  static_assert(kWarps <= kWarp && (kWarps & (kWarps - 1)) == 0, "a warp merges them");
  struct Room {
    double of_warp[kWarps][3];
  };
  STEPPO_SHARED(Room, room);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) {
    room.of_warp[warp][0] = of_warp.count;
    room.of_warp[warp][1] = of_warp.mean;
    room.of_warp[warp][2] = of_warp.squares;
  }
  __syncthreads();
  const double (&mine)[3] = room.of_warp[lane % kWarps];
  return spread_of_lanes<kWarps>({mine[0], mine[1], mine[2]});
}

// The spread of the numbers of a grid, of no more blocks than a block has threads, in those of the
// last block to come here, for which this returns true. All threads of all blocks call it.
template <int threads>
STEPPO_DEVICE bool spread_of_grid(Workspace* workspace, const Spread& of_warp, Spread& whole) {
  static_assert(threads * sizeof(Spread) <= sizeof(Workspace::partials), "there is no room for it");
  Spread* const parts = reinterpret_cast<Spread*>(workspace->partials);
  const Spread of_block = spread_of_block<threads>(of_warp);
  if (threadIdx.x == 0) parts[blockIdx.x] = of_block;
  if (!is_last_block(&workspace->counters[0], gridDim.x)) return false;
  const bool is_left = threadIdx.x < gridDim.x;
  const Spread of_part = is_left ? parts[threadIdx.x] : Spread{};
  whole = spread_of_block<threads>(spread_of_lanes<kWarp>(of_part));
  return true;
}

}  // namespace steppo::cuda
