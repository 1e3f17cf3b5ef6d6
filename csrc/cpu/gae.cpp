// Step-level GAE: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1},
// R_t = A_t + V_t over the steps of each trajectory (StepPO, arXiv 2604.18401, section 3).
#include <cmath>

#include "kernel.h"

namespace steppo::cpu::STEPPO_ISA {
namespace {

constexpr int64_t kSteps = 4096;

// Tokens that are looked at together.
constexpr int kBatch = 32;

// Adds the rewards of a row that lie outside of actions to the latest step before them, else to
// the first one. Looking back stops where the search before it started, so the work is linear.
template <class T>
void add_strays(const T* rewards, const int32_t* step_ids, int64_t row, int64_t row_end, T* total) {
  int64_t searched = row - 1, latest = -1, first = -1;
  for (int64_t i = row; i < row_end; ++i) {
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

// Adds the rewards of a row by step. Most batches lie within one step or outside of all, and under
// a layout of single tokens they are steps in sequence: loops without a branch a token.
template <class T>
void add_row(const T* rewards, const int32_t* step_ids, int64_t row, int64_t row_end, T* total) {
  int32_t step = -1;
  double sum = 0;
  int stray = 0;
  const auto enter = [&](int32_t next) {
    if (next == step) return;
    if (step >= 0) total[step] += static_cast<T>(sum);
    step = next;
    sum = 0;
  };
  int64_t i = row;
  while (i < row_end) {
    const int32_t* id = step_ids + i;
    const T* r = rewards + i;
    const int count = row_end - i < kBatch ? static_cast<int>(row_end - i) : kBatch;
    i += count;
    int same = count == kBatch, sequence = same;
    if (same) {
      for (int k = 0; k < kBatch; ++k) same &= id[k] == id[0];
      for (int k = 0; k < kBatch; ++k) sequence &= id[k] == id[0] + k;
    }
    if (same && id[0] < 0) {
      for (int k = 0; k < kBatch; ++k) stray |= r[k] != T(0);
    } else if (same) {
      enter(id[0]);
      double part = 0;
#pragma omp simd reduction(+ : part)
      for (int k = 0; k < kBatch; ++k) part += static_cast<double>(r[k]);
      sum += part;
    } else if (sequence && id[0] >= 0) {
      enter(-1);
      for (int k = 0; k < kBatch; ++k) total[id[0] + k] += r[k];
    } else {
      for (int k = 0; k < count; ++k) {
        if (id[k] < 0) {
          stray |= r[k] != T(0);
        } else {
          enter(id[k]);
          sum += static_cast<double>(r[k]);
        }
      }
    }
  }
  enter(-1);
  if (stray) add_strays(rewards, step_ids, row, row_end, total);
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

// Count, mean and sum of squared deviations of some advantages.
struct Spread {
  double count = 0, mean = 0, squares = 0;

  void merge(const Spread& other) {
    if (other.count == 0) return;
    const double apart = other.mean - mean, all = count + other.count;
    squares += other.squares + apart * apart * (count * other.count / all);
    mean += apart * (other.count / all);
    count = all;
  }
};

// The backward recursion over one trajectory; returns the spread of its advantages, taken from the
// first of them, so that equal ones have none. `rewards` may be `returns` itself: an entry is read
// before it is written.
template <class T>
Spread scan(const T* rewards, const T* values, const int64_t* state_index, const int64_t* steps,
            int64_t begin, int64_t end, double bootstrap, double gamma, double lam, T* advantages,
            T* returns) {
  if (begin == end) return {};
  const double decay = gamma * lam;
  double advantage = 0, next_value = bootstrap, origin = 0, sum = 0, squares = 0;
  for (int64_t k = end; k-- > begin;) {
    const int64_t step = steps[k];
    const double value = values[state_index == nullptr ? step : state_index[step]];
    const double delta = static_cast<double>(rewards[step]) + gamma * next_value - value;
    advantage = delta + decay * advantage;
    next_value = value;
    const T rounded = static_cast<T>(advantage);
    // What is whitened later is the rounded one: less its own mean it must come out as 0.
    if (k == end - 1) origin = static_cast<double>(rounded);
    const double off = static_cast<double>(rounded) - origin;
    sum += off;
    squares += off * off;
    advantages[step] = rounded;
    returns[step] = static_cast<T>(advantage + value);
  }
  const double count = static_cast<double>(end - begin);
  return {count, origin + sum / count, squares - sum * (sum / count)};
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
void whiten_members(T* advantages, const Spread& spread, const int64_t* steps, int64_t count,
                    int64_t num_steps, int threads) {
  const double squares = spread.squares < 0 ? 0 : spread.squares, mean = spread.mean;
  const double scale = count > 1 ? 1 / (std::sqrt(squares / (spread.count - 1)) + 1e-8) : 1;
  for_members(steps, count, num_steps, threads, [&](int64_t, int64_t begin, int64_t end, auto at) {
    for (int64_t k = begin; k < end; ++k) {
      T& a = advantages[at(k)];
      a = static_cast<T>((static_cast<double>(a) - mean) * scale);
    }
  });
}

}  // namespace

void step_gae(const GaeTensors& tensors, const Timeline& line, const GaeConfig& config,
              const Place& place) {
  const int threads = place.threads;
  const int64_t num_steps = line.num_steps, num_members = line.num_members;
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* bootstrap = static_cast<const T*>(tensors.bootstrap_values);
    T* a = static_cast<T*>(tensors.advantages);
    T* r = static_cast<T*>(tensors.returns);
    if (num_members < num_steps) fill(a, 0, num_steps, zero);
    const T* step_rewards = static_cast<const T*>(tensors.rewards);
    if (tensors.rewards_per_token) {
      sum_rewards(step_rewards, line.step_ids, line.row_offsets, line.num_tokens, line.num_rows,
                  num_steps, r, threads);
      step_rewards = r;
    }
    // Short trajectories share a task.
    const int64_t group = line.num_trajectories * kSteps / (num_members + 1) + 1;
    const int64_t tasks = ceil_div(line.num_trajectories, group);
    Buffer<Spread> spreads(tasks);
    parallel_blocks(
        line.num_trajectories, group, threads, [&](int64_t b, int64_t begin, int64_t end) {
          Spread spread;
          for (int64_t g = begin; g < end; ++g) {
            spread.merge(scan(step_rewards, static_cast<const T*>(tensors.values),
                              tensors.values_per_token ? line.state_index : nullptr,
                              line.trajectory_steps, line.trajectory_offsets[g],
                              line.trajectory_offsets[g + 1],
                              bootstrap == nullptr ? 0.0 : static_cast<double>(bootstrap[g]),
                              config.gamma, config.lam, a, r));
          }
          spreads[b] = spread;
        });
    if (num_members < num_steps) {
      // Rewards of steps without a trajectory may be left there.
      Buffer<bool> member(num_steps);
      fill(member.get(), 0, num_steps, false);
      for (int64_t k = 0; k < num_members; ++k) member[line.trajectory_steps[k]] = true;
      for (int64_t s = 0; s < num_steps; ++s) r[s] = member[s] ? r[s] : zero;
    }
    if (config.whiten && num_members > 0) {
      Spread all;
      for (int64_t b = 0; b < tasks; ++b) all.merge(spreads[b]);
      whiten_members(a, all, line.trajectory_steps, num_members, num_steps, threads);
    }
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
