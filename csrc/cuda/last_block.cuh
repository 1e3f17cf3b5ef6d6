// How one launch ends with numbers of all its blocks: the last block to finish adds up what each of
// them left, in the order of the blocks. Nothing waits for another block.
#pragma once

#include "device.cuh"
#include "steppo/cuda.h"

namespace steppo::cuda {

// Whether this block is the last one of the grid to come here. What every thread of the others
// wrote before is then visible to all of its threads. All threads of a block call it. The counter
// is 0 again when the grid has finished.
STEPPO_DEVICE bool is_last_block(unsigned* counter) {
  STEPPO_SHARED(unsigned, ticket);
  __syncthreads();
  if (threadIdx.x == 0) {
    // The fences of one thread cover what the barrier has ordered with it.
    __threadfence();
    ticket = atomicInc(counter, gridDim.x - 1);
    __threadfence();
  }
  __syncthreads();
  return ticket == gridDim.x - 1;
}

}  // namespace steppo::cuda
