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
template <int threads, class S>
STEPPO_DEVICE const S* merged_over_grid(Workspace* workspace) {
  static_assert(sizeof(S) <= Workspace::kFields * sizeof(double), "a part has no room for it");
  const auto part_of = [&](int block) { return workspace->partials + block * Workspace::kFields; };
  const S& whole = merged_over_block<threads, S>();
  if (threadIdx.x == 0) *reinterpret_cast<S*>(part_of(blockIdx.x)) = whole;
  if (!is_last_block(&workspace->counters[0], gridDim.x)) return nullptr;
  S& mine = sum_of_thread<threads, S>();
  const int blocks = static_cast<int>(gridDim.x);
  for (int b = threadIdx.x; b < blocks; b += threads) {
    merge_into(mine, *reinterpret_cast<const S*>(part_of(b)));
  }
  return &merged_over_block<threads, S>();
}

}  // namespace steppo::cuda
