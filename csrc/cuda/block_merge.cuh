// Merges what the threads of a block have added up, in a fixed order.
//
// A sum is a struct S of doubles, with a function merge(S& all, const S& other), and S{} is that of
// nothing. The sums of the threads lie in shared memory, where a large one takes no registers.
#pragma once

#include <cstring>

#include "device.cuh"

namespace steppo::cuda {

// Room for an S. One that begins with values cannot lie in shared memory by itself.
template <class S>
struct Slot {
  static_assert(sizeof(S) % sizeof(double) == 0, "a sum is made of doubles");

  double numbers[sizeof(S) / sizeof(double)];
};

template <int threads, class S>
STEPPO_DEVICE Slot<S>* slots_of_block() {
  STEPPO_SHARED(Slot<S>[threads], slots);
  return slots;
}

template <class S>
STEPPO_DEVICE S& sum_in(Slot<S>& slot) {
  return *reinterpret_cast<S*>(slot.numbers);
}

// The sum of this thread, from the beginning.
template <int threads, class S>
STEPPO_DEVICE S& sum_of_thread() {
  S& sum = sum_in(slots_of_block<threads, S>()[threadIdx.x]);
  sum = S{};
  return sum;
}

// Merges a sum into another one. All of both is loaded before anything is stored: field by field, a
// load would wait for the store before it, which might go to the same place.
template <class S>
STEPPO_DEVICE void merge_into(S& all, const S& other) {
  S merged = all;
  const S own = other;
  merge(merged, own);
  all = merged;
}

// The sum of a block: merges those of its threads, each of which calls this and `sum_of_thread`
// before. It lies where the sum of thread 0 was; a barrier has to come before that begins anew.
template <int threads, class S>
STEPPO_DEVICE const S& merged_over_block() {
  static_assert((threads & (threads - 1)) == 0, "a tree halves the threads");
  Slot<S>* const slots = slots_of_block<threads, S>();
  const int thread = threadIdx.x;
  for (int apart = threads / 2; apart > 0; apart /= 2) {
    __syncthreads();
    if (thread < apart) merge_into(sum_in(slots[thread]), sum_in(slots[thread + apart]));
  }
  __syncthreads();
  return sum_in(slots[0]);
}

}  // namespace steppo::cuda
