// Step-level GAE: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1},
// R_t = A_t + V_t over the steps of each trajectory (StepPO, arXiv 2604.18401, section 3).
#include <cmath>

#include "kernel.h"

namespace steppo::cpu::STEPPO_ISA {
namespace {

constexpr int64_t kSteps = 4096;

// Whether any of `count` tokens has a reward that is not on an action.
template <class T>
bool any_stray(const T* rewards, const int32_t* step_ids, int64_t count) {
  int found = 0;
  for (int64_t i = 0; i < count; ++i) found |= (rewards[i] != T(0)) & (step_ids[i] < 0);
  return found != 0;
}

// Adds the rewards of a row that lie outside of actions to the latest step before them, else to
// the first one. Looking back stops where the search before it started, so the work is linear.
template <class T>
void add_strays(const T* rewards, const int32_t* step_ids, int64_t row, int64_t row_end, T* total) {
  constexpr int64_t kProbe = 64;
  int64_t searched = row - 1, latest = -1, first = -1;
  for (int64_t probe = row; probe < row_end; probe += kProbe) {
    const int64_t stop = probe + kProbe < row_end ? probe + kProbe : row_end;
    if (!any_stray(rewards + probe, step_ids + probe, stop - probe)) continue;
    for (int64_t i = probe; i < stop; ++i) {
      if (step_ids[i] >= 0 || rewards[i] == T(0) || !std::isfinite(rewards[i])) continue;
      for (int64_t back = i - 1; back > searched; --back) {
        if (step_ids[back] >= 0) {
          latest = step_ids[back];
          break;
        }
      }
      searched = i;
      if (latest < 0 && first < 0) {
        for (int64_t ahead = i + 1; ahead < row_end && first < 0; ++ahead) first = step_ids[ahead];
        if (first < 0) return;
      }
      total[latest >= 0 ? latest : first] += rewards[i];
    }
  }
}

template <class T>
void add_row(const T* rewards, const int32_t* step_ids, int64_t row, int64_t row_end, T* total) {
  for (int64_t i = row; i < row_end;) {
    const int32_t step = step_ids[i];
    if (step < 0) {
      ++i;
      continue;
    }
    double sum = static_cast<double>(rewards[i++]);
    for (; i < row_end && step_ids[i] == step; ++i) sum += static_cast<double>(rewards[i]);
    total[step] += static_cast<T>(sum);
  }
  add_strays(rewards, step_ids, row, row_end, total);
}

// Whether every row has steps of its own. Ids do not decrease along a row, so its ends tell.
bool rows_are_apart(const int32_t* step_ids, const int64_t* row_offsets, int64_t num_rows) {
  int32_t before = -1;
  for (int64_t row = 0; row < num_rows; ++row) {
    int64_t first = row_offsets[row], last = row_offsets[row + 1];
    while (first < last && step_ids[first] < 0) ++first;
    while (first < last && step_ids[last - 1] < 0) --last;
    if (first == last) continue;
    if (step_ids[first] <= before) return false;
    before = step_ids[last - 1];
  }
  return true;
}

// Sums token rewards by step. Rows that share steps are taken in order by one thread.
template <class T>
void sum_rewards(const T* rewards, const int32_t* step_ids, const int64_t* row_offsets,
                 int64_t num_tokens, int64_t num_rows, int64_t num_steps, T* total, int threads) {
  fill(total, 0, num_steps, T(0));
  if (!rows_are_apart(step_ids, row_offsets, num_rows)) threads = 1;
  const int64_t group = num_rows * kBlock / (num_tokens + 1) + 1;
  parallel_blocks(num_rows, group, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      add_row(rewards, step_ids, row_offsets[row], row_offsets[row + 1], total);
    }
  });
}

// The backward recursion over one trajectory; returns the sum of its advantages. `rewards` may be
// `returns` itself: an entry is read before it is written.
template <class T>
double scan(const T* rewards, const T* values, const int64_t* state_index, const int64_t* steps,
            int64_t begin, int64_t end, double bootstrap, double gamma, double lam, T* advantages,
            T* returns) {
  const double decay = gamma * lam;
  double advantage = 0, next_value = bootstrap, sum = 0;
  for (int64_t k = end; k-- > begin;) {
    const int64_t step = steps[k];
    const double value = values[state_index == nullptr ? step : state_index[step]];
    const double delta = static_cast<double>(rewards[step]) + gamma * next_value - value;
    advantage = delta + decay * advantage;
    next_value = value;
    const T rounded = static_cast<T>(advantage);
    // What is whitened later is the rounded one: less its own mean it must come out as 0.
    sum += static_cast<double>(rounded);
    advantages[step] = rounded;
    returns[step] = static_cast<T>(advantage + value);
  }
  return sum;
}

// Calls body(block, begin, end, at) over all trajectory members; at(k) is the k-th one's step. If
// every step is a member, the order does not matter and at(k) is k.
template <class F>
void for_members(const int64_t* steps, int64_t count, int64_t num_steps, int threads, F&& body) {
  parallel_blocks(count, kSteps, threads, [&](int64_t b, int64_t begin, int64_t end) {
    if (count == num_steps) {
      body(b, begin, end, [](int64_t k) { return k; });
    } else {
      body(b, begin, end, [steps](int64_t k) { return steps[k]; });
    }
  });
}

template <class T>
void whiten_members(T* advantages, double sum, const int64_t* steps, int64_t count,
                    int64_t num_steps, int threads) {
  const double n = static_cast<double>(count), mean = sum / n;
  double scale = 1;
  if (count > 1) {
    const int64_t blocks = ceil_div(count, kSteps);
    Buffer<double> partial(blocks);
    for_members(steps, count, num_steps, threads,
                [&](int64_t b, int64_t begin, int64_t end, auto at) {
                  double squares = 0;
#pragma omp simd reduction(+ : squares)
                  for (int64_t k = begin; k < end; ++k) {
                    const double off = static_cast<double>(advantages[at(k)]) - mean;
                    squares += off * off;
                  }
                  partial[b] = squares;
                });
    double squares = 0;
    for (int64_t b = 0; b < blocks; ++b) squares += partial[b];
    scale = 1 / (std::sqrt(squares / (n - 1)) + 1e-8);
  }
  for_members(steps, count, num_steps, threads, [&](int64_t, int64_t begin, int64_t end, auto at) {
    for (int64_t k = begin; k < end; ++k) {
      T& a = advantages[at(k)];
      a = static_cast<T>((static_cast<double>(a) - mean) * scale);
    }
  });
}

}  // namespace

void step_gae(int dtype, const void* rewards, const void* values, bool rewards_per_token,
              bool values_per_token, const int32_t* step_ids, const int64_t* row_offsets,
              const int64_t* state_index, const int64_t* trajectory_steps,
              const int64_t* trajectory_offsets, const void* bootstrap_values, double gamma,
              double lam, bool whiten, int64_t num_tokens, int64_t num_rows, int64_t num_steps,
              int64_t num_members, int64_t num_trajectories, void* advantages, void* returns,
              int threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* bootstrap = static_cast<const T*>(bootstrap_values);
    T* a = static_cast<T*>(advantages);
    T* r = static_cast<T*>(returns);
    if (num_members < num_steps) fill(a, 0, num_steps, zero);
    const T* step_rewards = static_cast<const T*>(rewards);
    if (rewards_per_token) {
      sum_rewards(step_rewards, step_ids, row_offsets, num_tokens, num_rows, num_steps, r, threads);
      step_rewards = r;
    }
    // Short trajectories share a task.
    const int64_t group = num_trajectories * kSteps / (num_members + 1) + 1;
    const int64_t tasks = ceil_div(num_trajectories, group);
    Buffer<double> sums(tasks);
    parallel_blocks(num_trajectories, group, threads, [&](int64_t b, int64_t begin, int64_t end) {
      double sum = 0;
      for (int64_t g = begin; g < end; ++g) {
        sum += scan(
            step_rewards, static_cast<const T*>(values), values_per_token ? state_index : nullptr,
            trajectory_steps, trajectory_offsets[g], trajectory_offsets[g + 1],
            bootstrap == nullptr ? 0.0 : static_cast<double>(bootstrap[g]), gamma, lam, a, r);
      }
      sums[b] = sum;
    });
    if (num_members < num_steps) {
      // Rewards of steps without a trajectory may be left there.
      Buffer<bool> member(num_steps);
      fill(member.get(), 0, num_steps, false);
      for (int64_t k = 0; k < num_members; ++k) member[trajectory_steps[k]] = true;
      for (int64_t s = 0; s < num_steps; ++s) r[s] = member[s] ? r[s] : zero;
    }
    if (whiten && num_members > 0) {
      double sum = 0;
      for (int64_t b = 0; b < tasks; ++b) sum += sums[b];
      whiten_members(a, sum, trajectory_steps, num_members, num_steps, threads);
    }
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
