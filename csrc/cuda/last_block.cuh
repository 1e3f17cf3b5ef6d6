// How one launch ends with numbers of all its blocks: the last block to finish merges what each of
// them left, in the order of the blocks. Nothing waits for another block.
#pragma once

#include "block_merge.cuh"
#include "steppo/cuda.h"

namespace steppo::cuda {

// Whether this block is the last one of `blocks` to come here. What thread 0 of the others wrote
// before, and what barriers have ordered before that, is then visible to all of its threads. All
// threads of a block call it, once. The counter is 0 again when all have come.
STEPPO_DEVICE bool is_last_block(unsigned* counter, unsigned blocks) {
  STEPPO_SHARED(unsigned, ticket);
  if (threadIdx.x == 0) {
    ticket = take_ticket(counter, blocks - 1);
  }
  __syncthreads();
  return ticket == blocks - 1;
}

// Merges the sums of all threads of a grid, and returns the whole in the last block to come here,
// null in the others. All threads of all blocks call it.
template <int threads, class S, class Joins = AllAdded>
STEPPO_DEVICE const S* merged_over_grid(Workspace* workspace) {
  constexpr int kMost = Workspace::kParts, kFields = kFieldsOf<S>;
  static_assert(kFields <= Workspace::kFields, "a part has no room for it");
  static_assert(kFields <= kWarp, "a warp leaves it");
  const int thread = threadIdx.x;
  const Slot<S>* const slots = slots_of_block<threads, S>();
  SumsAt sums = sums_of_threads<threads, S>();
  __syncthreads();
  // The threads of a block first, and the blocks then, by the same instructions: new ones would be
  // waited for while nothing else runs.
#pragma unroll 1
  for (bool is_of_grid = false;; is_of_grid = true) {
    merge_fields<threads, S, Joins>(sums);
    __syncthreads();
    if (is_of_grid) return &sum_in(slots_of_block<threads, S>()[0]);
    // Those who merge load the same field of neighbouring blocks together.
    if (thread < kFields) {
      workspace->partials[thread * kMost + blockIdx.x] = slots[0].numbers[thread];
    }
    // Thread 0 tells others what its warp wrote.
    if (thread < kWarp) __syncwarp();
    if (!is_last_block(&workspace->counters[0], gridDim.x)) return nullptr;
    sums = {workspace->partials, kMost, 1, static_cast<int>(gridDim.x)};
  }
}

}  // namespace steppo::cuda
