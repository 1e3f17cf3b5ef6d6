// Merges what the threads of a block have added up, in a fixed order.
//
// A sum is a struct S of doubles, and S{} is that of nothing. The sums of the threads lie in shared
// memory, where a large one takes no registers. Each field is merged by itself, by one of the
// warps.
#pragma once

#include <cstring>

#include "device.cuh"

namespace steppo::cuda {

template <class S>
constexpr int kFieldsOf = sizeof(S) / sizeof(double);

// Room for an S. One that begins with values cannot lie in shared memory by itself. Of an odd
// number of doubles, neighbouring lanes find the same field in different banks.
template <class S>
struct Slot {
  static_assert(sizeof(S) % sizeof(double) == 0, "a sum is made of doubles");

  double numbers[kFieldsOf<S> | 1];
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

// How a field of sums joins that is added up, and what adds nothing.
struct Added {
  static constexpr double kNone = 0;

  STEPPO_DEVICE double of(double a, double b) { return a + b; }
};

// How the fields of sums join: calls body(join) with that of a field.
struct AllAdded {
  template <class F>
  STEPPO_DEVICE auto with(int, F&& body) {
    return body(Added{});
  }
};

// What `count` numbers join to, no more than `most` a lane. The lanes of a warp load them together,
// and all of them get it.
template <int most, class Join, class Number>
STEPPO_DEVICE double joined_by_warp(Join, int count, Number&& number_of) {
  const int lane = threadIdx.x % kWarp;
  double numbers[most];
#pragma unroll
  for (int k = 0; k < most; ++k) {
    const int at = lane + k * kWarp;
    numbers[k] = at < count ? number_of(at) : Join::kNone;
  }
#pragma unroll
  for (int apart = 1; apart < most; apart *= 2) {
#pragma unroll
    for (int k = 0; k + apart < most; k += 2 * apart) {
      numbers[k] = Join::of(numbers[k], numbers[k + apart]);
    }
  }
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    numbers[0] = Join::of(numbers[0], __shfl_xor_sync(kAllLanes, numbers[0], apart));
  }
  return numbers[0];
}

// Merges sums of which `number_of(field, k)` is a field of the k-th, of `count` and at most `most`,
// into the slot of thread 0. All threads of a block call it, and can read that after a barrier.
template <int threads, int most, class S, class Joins, class Number>
STEPPO_DEVICE void merge_fields(int count, Number&& number_of) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int field = warp; field < kFieldsOf<S>; field += threads / kWarp) {
    const double joined = Joins::with(field, [&](auto join) {
      return joined_by_warp<most / kWarp>(join, count, [&](int k) { return number_of(field, k); });
    });
    if (lane == 0) slots_of_block<threads, S>()[0].numbers[field] = joined;
  }
}

// The sum of a block: merges those of its threads, each of which calls this and `sum_of_thread`
// before. It lies where the sum of thread 0 was; a barrier has to come before that begins anew.
template <int threads, class S, class Joins = AllAdded>
STEPPO_DEVICE const S& merged_over_block() {
  Slot<S>* const slots = slots_of_block<threads, S>();
  __syncthreads();
  merge_fields<threads, threads, S, Joins>(
      threads, [&](int field, int thread) { return slots[thread].numbers[field]; });
  __syncthreads();
  return sum_in(slots[0]);
}

}  // namespace steppo::cuda
