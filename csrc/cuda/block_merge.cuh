// Merges what the threads of a block have added up, in a fixed order.
//
// A sum is a struct S of doubles, with a function merge(S& all, const S& other), and S{} is that of
// nothing.
#pragma once

#include <cstring>

#include "device.cuh"

namespace steppo::cuda {

// The sum that the lane `apart` behind has.
template <class S>
STEPPO_DEVICE S sum_of_lane_behind(const S& mine, int apart) {
  constexpr int kNumbers = sizeof(S) / sizeof(double);
  double numbers[kNumbers];
  std::memcpy(numbers, &mine, sizeof mine);
#pragma unroll
  for (int k = 0; k < kNumbers; ++k) {
    numbers[k] = __shfl_down_sync(kAllLanes, numbers[k], apart);
  }
  S other;
  std::memcpy(&other, numbers, sizeof other);
  return other;
}

// Lane 0 gets the sum of its warp.
template <class S>
STEPPO_DEVICE S merged_over_warp(S mine) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) merge(mine, sum_of_lane_behind(mine, apart));
  return mine;
}

// The sum of a block. All of its threads call it, and each gets the sum.
template <int threads, class S>
STEPPO_DEVICE S merged_over_block(S mine) {
  constexpr int kWarps = threads / kWarp;
  struct Sums {
    S of_warp[kWarps], of_block;
  };
  STEPPO_SHARED(Sums, sums);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  mine = merged_over_warp(mine);
  if (lane == 0) sums.of_warp[warp] = mine;
  __syncthreads();
  if (warp == 0) {
    mine = merged_over_warp(lane < kWarps ? sums.of_warp[lane] : S{});
    if (lane == 0) sums.of_block = mine;
  }
  // The next call writes to no sum that is read here: this barrier, or one of its own, lies
  // between.
  __syncthreads();
  return sums.of_block;
}

}  // namespace steppo::cuda
