// Merges what the threads of a block have added up, in a fixed order.
//
// A sum is a struct S of doubles, and S{} is that of nothing. The sums of the threads lie in shared
// memory, where a large one takes no registers. Each field is merged by itself, by a warp or by
// half of one.
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

// How the fields of sums join: `with` calls body(join) with how two neighbouring fields do, `first`
// and the one behind it. What joins is `turned`.
struct AllAdded {
  template <class F>
  STEPPO_DEVICE auto with(int, F&& body) {
    return body(Added{});
  }

  STEPPO_DEVICE double turned(int, double number) { return number; }
};

// Numbers that a lane loads before it joins them: there are registers for so many.
constexpr int kNumbersTogether = 16;

// What `count` numbers that are `apart` join to. `lanes` neighbouring lanes load them together, and
// all of these get it. `turned` makes of a number what joins.
template <int lanes, class Join, class Turned>
STEPPO_DEVICE double joined_by_lanes(Join, const double* numbers, int apart, int count,
                                     Turned&& turned) {
  double joined = Join::kNone;
#pragma unroll 1
  for (int i = threadIdx.x % lanes; i < count; i += kNumbersTogether * lanes) {
    double own[kNumbersTogether];
    const double* at = numbers + i * apart;
#pragma unroll
    for (int k = 0; k < kNumbersTogether; ++k) {
      own[k] = i + k * lanes < count ? turned(*at) : Join::kNone;
      at += lanes * apart;
    }
#pragma unroll
    for (int with = 1; with < kNumbersTogether; with *= 2) {
#pragma unroll
      for (int k = 0; k + with < kNumbersTogether; k += 2 * with) {
        own[k] = Join::of(own[k], own[k + with]);
      }
    }
    joined = Join::of(joined, own[0]);
  }
#pragma unroll
  for (int with = lanes / 2; with > 0; with /= 2) {
    joined = Join::of(joined, __shfl_xor_sync(kAllLanes, joined, with));
  }
  return joined;
}

// Lanes that merge a field. A warp takes two fields at once where it would take them after each
// other: what lanes wait for is longer than what they do.
template <int threads, class S>
constexpr int kLanesOfField = kFieldsOf<S> * kWarp <= threads ? kWarp : kWarp / 2;

// Sums that lie in memory: field f of the k-th of `count` is at[f * of_field + k * of_sum].
struct SumsAt {
  const double* at;
  int of_field, of_sum, count;
};

// Merges sums into the slot of thread 0. All threads of a block call it, and can read that after a
// barrier.
template <int threads, class S, class Joins>
STEPPO_DEVICE void merge_fields(const SumsAt& sums) {
  constexpr int kLanes = kLanesOfField<threads, S>, kOfWarp = kWarp / kLanes;
  const int own = threadIdx.x % kWarp / kLanes, lane = threadIdx.x % kLanes;
  // Lanes meet in joins, and go through the loop together.
  for (int first = threadIdx.x / kWarp * kOfWarp; first < kFieldsOf<S>; first += threads / kLanes) {
    const int field = first + own;
    const int count = field < kFieldsOf<S> ? sums.count : 0;
    const double* const numbers = sums.at + field * sums.of_field;
    const double joined = Joins::with(first, [&](auto join) {
      return joined_by_lanes<kLanes>(join, numbers, sums.of_sum, count,
                                     [&](double number) { return Joins::turned(field, number); });
    });
    if (count > 0 && lane == 0) {
      slots_of_block<threads, S>()[0].numbers[field] = Joins::turned(field, joined);
    }
  }
}

// Those of the threads of a block.
template <int threads, class S>
STEPPO_DEVICE SumsAt sums_of_threads() {
  const Slot<S>* const slots = slots_of_block<threads, S>();
  return {slots[0].numbers, 1, static_cast<int>(sizeof(Slot<S>) / sizeof(double)), threads};
}

// The sum of a block: merges those of its threads, each of which calls this and `sum_of_thread`
// before. It lies where the sum of thread 0 was; a barrier has to come before that begins anew.
template <int threads, class S>
STEPPO_DEVICE const S& merged_over_block() {
  __syncthreads();
  merge_fields<threads, S, AllAdded>(sums_of_threads<threads, S>());
  __syncthreads();
  return sum_in(slots_of_block<threads, S>()[0]);
}

}  // namespace steppo::cuda
