// How the lanes of a warp get the steps of a trajectory that they compute with, and where results
// go. A lane has `steps` steps that follow each other, and the lane after it those before, in time.
#pragma once

#include "device.cuh"

namespace steppo::cuda {

// The members of a trajectory, and what steps have.
template <class T>
struct GaeSource {
  const std::int64_t* members;
  int length;
  // Where the value of a step is; null where it is that of the step's number.
  const std::int64_t* state_index;
  const T *values, *rewards;

  // The step that is a member, -1 where there is none.
  STEPPO_MEMBER std::int64_t step_at(int member) const {
    return member >= 0 && member < length ? members[member] : -1;
  }
  STEPPO_MEMBER std::int64_t state_of(std::int64_t step) const {
    return step < 0 || state_index == nullptr ? step : state_index[step];
  }
};

// What a lane computes with: of its steps, latest first, the rewards, and behind the value of the
// step after them, in time, the values. 0 where there is no step.
template <class T, int steps>
struct GaeNumbers {
  T reward[steps], value[steps + 1];
};

// Each lane loads and stores its own steps. Where a load says what another one reads, those of all
// steps are under way together.
template <class T, int steps>
struct OwnTile {
  std::int64_t step[steps];

  // `latest` is the member that lane 0 begins with.
  STEPPO_MEMBER GaeNumbers<T, steps> load(const GaeSource<T>& source, int latest, int lane) {
    latest -= lane * steps;
    const std::int64_t after = source.step_at(latest + 1);
#pragma unroll
    for (int k = 0; k < steps; ++k) step[k] = source.step_at(latest - k);
    std::int64_t state[steps + 1];
    state[0] = source.state_of(after);
#pragma unroll
    for (int k = 0; k < steps; ++k) state[k + 1] = source.state_of(step[k]);
    GaeNumbers<T, steps> numbers;
#pragma unroll
    for (int k = 0; k <= steps; ++k)
      numbers.value[k] = state[k] < 0 ? T(0) : source.values[state[k]];
#pragma unroll
    for (int k = 0; k < steps; ++k)
      numbers.reward[k] = step[k] < 0 ? T(0) : source.rewards[step[k]];
    return numbers;
  }

  STEPPO_MEMBER void store(const T (&advantage)[steps], const T (&value_return)[steps],
                           T* advantages, T* returns, int) const {
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      if (step[k] < 0) continue;
      advantages[step[k]] = advantage[k];
      returns[step[k]] = value_return[k];
    }
  }
};

// Lanes load and store steps of the warp that lie side by side, and exchange them: the members of a
// long trajectory mostly are neighbours in memory, and so are their numbers. The lanes have to meet
// between `load` and `store`.
template <class T, int steps>
struct SharedTile {
  // Places of the lanes' own steps lie in different banks.
  struct Room {
    T first[kWarp * (steps + 1)], second[kWarp * (steps + 1)];
  };

  Room& room;
  std::int64_t step[steps];

  STEPPO_DEVICE int place_of(int position) { return position + position / steps; }

  STEPPO_MEMBER GaeNumbers<T, steps> load(const GaeSource<T>& source, int latest, int lane) {
    // What comes after the warp's steps is loaded by the first lane alone.
    const std::int64_t after = lane == 0 ? source.step_at(latest + 1) : -1;
#pragma unroll
    for (int k = 0; k < steps; ++k) step[k] = source.step_at(latest - k * kWarp - lane);
    std::int64_t state[steps];
    const std::int64_t state_after = source.state_of(after);
#pragma unroll
    for (int k = 0; k < steps; ++k) state[k] = source.state_of(step[k]);
    GaeNumbers<T, steps> numbers;
    numbers.value[0] = state_after < 0 ? T(0) : source.values[state_after];
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      numbers.value[k + 1] = state[k] < 0 ? T(0) : source.values[state[k]];
      numbers.reward[k] = step[k] < 0 ? T(0) : source.rewards[step[k]];
    }
    exchange_in(numbers, lane);
    return numbers;
  }

  STEPPO_MEMBER void store(const T (&advantage)[steps], const T (&value_return)[steps],
                           T* advantages, T* returns, int lane) const {
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      room.first[place_of(lane * steps + k)] = advantage[k];
      room.second[place_of(lane * steps + k)] = value_return[k];
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      if (step[k] < 0) continue;
      advantages[step[k]] = room.first[place_of(k * kWarp + lane)];
      returns[step[k]] = room.second[place_of(k * kWarp + lane)];
    }
  }

 private:
  STEPPO_MEMBER void exchange_in(GaeNumbers<T, steps>& numbers, int lane) const {
    // Of the tile before, a lane has read what it now writes to.
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      room.first[place_of(k * kWarp + lane)] = numbers.value[k + 1];
      room.second[place_of(k * kWarp + lane)] = numbers.reward[k];
    }
    __syncwarp();
    if (lane > 0) numbers.value[0] = room.first[place_of(lane * steps - 1)];
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      numbers.value[k + 1] = room.first[place_of(lane * steps + k)];
      numbers.reward[k] = room.second[place_of(lane * steps + k)];
    }
  }
};

}  // namespace steppo::cuda
