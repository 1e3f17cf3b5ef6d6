// Merges the spreads of threads and of blocks, in a fixed order. Many at once have one mean, and
// divide once for it.
#pragma once

#include "last_block.cuh"
#include "steppo/spread.h"

namespace steppo::cuda {

// The spread of the numbers of all lanes of a warp, which all get it. That of equal ones is 0, to
// the last bit.
STEPPO_DEVICE Spread spread_of_lanes(const Spread& own) {
  const unsigned with_some = __ballot_sync(kAllLanes, own.count > 0);
  if (with_some == 0) return Spread{};
  const bool is_some = own.count > 0;
  const int first = __ffs(static_cast<int>(with_some)) - 1;
  const double near = __shfl_sync(kAllLanes, own.mean, first);
  const double count = sum_of_lanes<kWarp>(own.count);
  const double apart = sum_of_lanes<kWarp>(is_some ? own.count * (own.mean - near) : 0.0);
  const double mean = near + apart / count;
  const double rest = own.mean - mean;
  const double squares = is_some ? own.squares + own.count * (rest * rest) : 0.0;
  return {count, mean, sum_of_lanes<kWarp>(squares)};
}

// The spread of the numbers of all threads of a block, which all call it and get it. A barrier has
// to lie between two calls.
template <int threads>
STEPPO_DEVICE Spread spread_of_block(const Spread& own) {
  constexpr int kWarps = threads / kWarp;
  static_assert(kWarps <= kWarp, "a warp merges them");
  struct Room {
    double of_warp[kWarps][3];
  };
  STEPPO_SHARED(Room, room);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Spread of_warp = spread_of_lanes(own);
  if (lane == 0) {
    room.of_warp[warp][0] = of_warp.count;
    room.of_warp[warp][1] = of_warp.mean;
    room.of_warp[warp][2] = of_warp.squares;
  }
  __syncthreads();
  Spread mine{};
  if (lane < kWarps) {
    mine = {room.of_warp[lane][0], room.of_warp[lane][1], room.of_warp[lane][2]};
  }
  return spread_of_lanes(mine);
}

// The spread of the numbers of a grid, of no more blocks than a block has threads, in those of the
// last block to come here, for which this returns true. All threads of all blocks call it.
template <int threads>
STEPPO_DEVICE bool spread_of_grid(Workspace* workspace, const Spread& own, Spread& whole) {
  static_assert(threads * sizeof(Spread) <= sizeof(Workspace::partials), "there is no room for it");
  Spread* const parts = reinterpret_cast<Spread*>(workspace->partials);
  const Spread of_block = spread_of_block<threads>(own);
  if (threadIdx.x == 0) parts[blockIdx.x] = of_block;
  if (!is_last_block(&workspace->counters[0], gridDim.x)) return false;
  const bool is_left = threadIdx.x < gridDim.x;
  whole = spread_of_block<threads>(is_left ? parts[threadIdx.x] : Spread{});
  return true;
}

}  // namespace steppo::cuda
