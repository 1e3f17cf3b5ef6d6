// Running results over the threads of a block, in their order.
#pragma once

#include "device.cuh"

namespace steppo::cuda {

struct Sum {
  template <class T>
  STEPPO_DEVICE T of(T a, T b) {
    return a + b;
  }
};

struct Largest {
  template <class T>
  STEPPO_DEVICE T of(T a, T b) {
    return a > b ? a : b;
  }
};

struct Smallest {
  template <class T>
  STEPPO_DEVICE T of(T a, T b) {
    return a < b ? a : b;
  }
};

// What the values of the lanes of a warp join to, up to that of this one. All lanes call it.
template <class Join, class T>
STEPPO_DEVICE T joined_upto(T value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const T other = __shfl_up_sync(kAllLanes, value, apart);
    if (lane >= apart) value = Join::of(other, value);
  }
  return value;
}

// What the values of the threads before this one join to, and what those of all threads do.
template <class T>
struct Scanned {
  T before, all;
};

// `none` is what joins to nothing else. All threads of a block call it.
template <int threads, class Join, class T>
STEPPO_DEVICE Scanned<T> scan_block(T value, T none) {
  constexpr int kWarps = threads / kWarp;
  struct alignas(16) Totals {
    T at[kWarps];
  };
  STEPPO_SHARED(Totals, totals);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const T upto = joined_upto<Join>(value);
  T before = __shfl_up_sync(kAllLanes, upto, 1);
  if (lane == 0) before = none;
  // A thread may still read the totals of the call before.
  __syncthreads();
  if (lane == kWarp - 1) totals.at[warp] = upto;
  __syncthreads();
  Scanned<T> found{none, none};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) found.before = Join::of(found.all, before);
    found.all = Join::of(found.all, totals.at[w]);
  }
  return found;
}

// What the values of all threads of a block join to.
template <int threads, class Join, class T>
STEPPO_DEVICE T join_block(T value, T none) {
  return scan_block<threads, Join>(value, none).all;
}

}  // namespace steppo::cuda
