// How one launch ends with numbers of all its blocks: the last block to finish merges what each of
// them left, in the order of the blocks. Nothing waits for another block.
//
// What is merged is a struct S of doubles, which begins as S{}, with a function merge(S&, const
// S&).
#pragma once

#include <cstring>

#include "device.cuh"
#include "steppo/cuda.h"

namespace steppo::cuda {

// The numbers of S. A struct that begins with values cannot lie in shared memory.
template <class S>
struct Numbers {
  static constexpr int kCount = sizeof(S) / sizeof(double);
  static_assert(kCount <= Workspace::kFields, "a part of the workspace is too small");

  double at[kCount];
};

template <class S>
STEPPO_DEVICE void put(double* numbers, const S& from) {
  std::memcpy(numbers, static_cast<const void*>(&from), sizeof from);
}

template <class S>
STEPPO_DEVICE S get(const double* numbers) {
  S made;
  std::memcpy(static_cast<void*>(&made), numbers, sizeof made);
  return made;
}

// Whether this block is the last one of the grid to come here. What thread 0 of the others wrote
// before, and what barriers have ordered before that, is then visible to all of its threads. All
// threads of a block call it, once. The counter is 0 again when the grid has finished.
STEPPO_DEVICE bool is_last_block(unsigned* counter) {
  STEPPO_SHARED(unsigned, ticket);
  if (threadIdx.x == 0) {
    __threadfence();
    ticket = atomicInc(counter, gridDim.x - 1);
    __threadfence();
  }
  __syncthreads();
  return ticket == gridDim.x - 1;
}

// Merges what the threads of a block have, and returns the whole, which lies in shared memory: so
// that it takes no registers. All threads of the block call it.
template <int threads, class S>
STEPPO_DEVICE const S& merge_block(S own) {
  constexpr int kWarps = threads / kWarp;
  STEPPO_SHARED(Numbers<S>[kWarps], warps);
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    Numbers<S> numbers;
    put(numbers.at, own);
#pragma unroll
    for (int k = 0; k < Numbers<S>::kCount; ++k) {
      numbers.at[k] = __shfl_xor_sync(kAllLanes, numbers.at[k], apart);
    }
    merge(own, get<S>(numbers.at));
  }
  if (threadIdx.x % kWarp == 0) put(warps[threadIdx.x / kWarp].at, own);
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) merge(own, get<S>(warps[w].at));
    put(warps[0].at, own);
  }
  __syncthreads();
  return *reinterpret_cast<const S*>(warps[0].at);
}

// Merges what the first `blocks` blocks of a grid have, and returns the whole in the last block to
// come here, null in the others. All threads of all blocks call it.
template <int threads, class S>
STEPPO_DEVICE const S* merge_grid(const S& own, int blocks, Workspace* workspace) {
  if (static_cast<int>(blockIdx.x) < blocks) {
    const S& whole = merge_block<threads>(own);
    if (threadIdx.x == 0) put(workspace->partials + blockIdx.x * Workspace::kFields, whole);
  }
  if (!is_last_block(&workspace->counters[0])) return nullptr;
  S some;
  for (int b = threadIdx.x; b < blocks; b += threads)
    merge(some, get<S>(workspace->partials + b * Workspace::kFields));
  return &merge_block<threads>(some);
}

}  // namespace steppo::cuda
