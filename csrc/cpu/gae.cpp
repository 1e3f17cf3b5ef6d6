// Step-level GAE: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1},
// R_t = A_t + V_t over the steps of each trajectory (StepPO, arXiv 2604.18401, section 3).
#include <cmath>

#include "outline.h"
#include "steppo/spread.h"

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

template <class T>
double sum_of(const T* values, int64_t first, int64_t last) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = first; i < last; ++i) sum += static_cast<double>(values[i]);
  return sum;
}

template <class T>
bool any_reward(const T* values, int64_t first, int64_t last) {
  int any = 0;
  for (int64_t i = first; i < last; ++i) any |= values[i] != T(0);
  return any != 0;
}

// The first step that begins at `position` or behind it, where steps ascend.
int64_t first_step_at(const Timeline& line, int64_t position) {
  return first_not_below(line.num_steps, position, [&](int64_t s) { return line.step_starts[s]; });
}

// Adds the rewards of one row whose steps [first, last) lie in it one behind the other, and tells
// of rewards that lie between them. It reads no ids. The values that `scan` takes of these steps
// are fetched meanwhile: rewards are a stream, and values lie wherever steps begin.
template <class T>
bool add_pieces(const T* rewards, const T* values, const Timeline& line, int64_t row, int64_t first,
                int64_t last, T* total) {
  int64_t at = line.row_offsets[row];
  int stray = 0;
  for (int64_t s = first; s < last; ++s) {
    if (values != nullptr) __builtin_prefetch(values + line.state_index[s]);
    const int64_t begin = line.step_starts[s];
    const int64_t end = begin + line.step_offsets[s + 1] - line.step_offsets[s];
    stray |= any_reward(rewards, at, begin);
    total[s] = static_cast<T>(sum_of(rewards, begin, end));
    at = end;
  }
  return stray | any_reward(rewards, at, line.row_offsets[row + 1]);
}

// Whether steps are long enough for a look at each, lie in one piece each, and each in one row.
bool lie_in_pieces(const Timeline& line, int threads) {
  const int64_t num_steps = line.num_steps;
  if (num_steps == 0 || line.step_offsets[num_steps] < 8 * num_steps) return false;
  const Outline found = outline(line.step_offsets, line.step_starts, nullptr, num_steps, threads);
  if (!found.is_ascending || found.steps < static_cast<double>(num_steps)) return false;
  for (int64_t row = 1; row < line.num_rows; ++row) {
    const int64_t border = line.row_offsets[row];
    const int64_t next = first_step_at(line, border);
    if (next == 0) continue;
    const int64_t length = line.step_offsets[next] - line.step_offsets[next - 1];
    if (line.step_starts[next - 1] + length > border) return false;
  }
  return true;
}

// Sums token rewards by step. Rows that share steps are taken in order by one thread. `values` are
// those of tokens, or null.
template <class T>
void sum_rewards(const T* rewards, const T* values, const Timeline& line, T* total, int threads) {
  fill(total, 0, line.num_steps, T(0));
  const int64_t group = line.num_rows * kBlock / (line.num_tokens + 1) + 1;
  const bool in_pieces = lie_in_pieces(line, threads);
  if (!in_pieces && !rows_are_apart(line.step_ids, line.row_offsets, line.num_rows)) threads = 1;
  parallel_blocks(line.num_rows, group, threads, [&](int64_t, int64_t begin, int64_t end) {
    int64_t next = in_pieces ? first_step_at(line, line.row_offsets[begin]) : 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = line.row_offsets[row], last = line.row_offsets[row + 1];
      if (!in_pieces) {
        add_row(rewards, line.step_ids, first, last, total);
        continue;
      }
      const int64_t step = next;
      while (next < line.num_steps && line.step_starts[next] < last) ++next;
      if (add_pieces(rewards, values, line, row, step, next, total)) {
        add_strays(rewards, line.step_ids, first, last, total);
      }
    }
  });
}

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
  const auto place_of = [&](int64_t k) {
    return state_index == nullptr ? steps[k] : state_index[steps[k]];
  };
  constexpr int64_t kAhead = 16;
  for (int64_t k = end; k-- > begin;) {
    // Values lie wherever steps begin.
    if (k - kAhead >= begin) __builtin_prefetch(values + place_of(k - kAhead));
    const int64_t step = steps[k];
    const double value = values[place_of(k)];
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
  const Whitening by = whitening(spread);
  for_members(steps, count, num_steps, threads, [&](int64_t, int64_t begin, int64_t end, auto at) {
    for (int64_t k = begin; k < end; ++k) {
      T& a = advantages[at(k)];
      a = static_cast<T>(whitened(static_cast<double>(a), by));
    }
  });
}

}  // namespace

void step_gae(const GaeTensors& tensors, const Timeline& line, const GaeConfig& config,
              const Place& place) {
  const int64_t num_steps = line.num_steps, num_members = line.num_members;
  const int64_t num_tokens = tensors.rewards_per_token ? line.num_tokens : 0;
  const int threads = worthwhile_threads(num_tokens + 8 * num_steps, place.threads);
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* values = static_cast<const T*>(tensors.values);
    const T* bootstrap = static_cast<const T*>(tensors.bootstrap_values);
    T* a = static_cast<T*>(tensors.advantages);
    T* r = static_cast<T*>(tensors.returns);
    if (num_members < num_steps) fill(a, 0, num_steps, zero);
    const T* step_rewards = static_cast<const T*>(tensors.rewards);
    if (tensors.rewards_per_token) {
      sum_rewards(step_rewards, tensors.values_per_token ? values : nullptr, line, r, threads);
      step_rewards = r;
    }
    // Short trajectories share a task.
    const int64_t group = line.num_trajectories * kSteps / (num_members + 1) + 1;
    const int64_t tasks = ceil_div(line.num_trajectories, group);
    Buffer<Spread> spreads(tasks);
    parallel_blocks(
        line.num_trajectories, group, threads, [&](int64_t b, int64_t begin, int64_t end) {
          Spread spread{};
          for (int64_t g = begin; g < end; ++g) {
            merge(spread,
                  scan(step_rewards, values, tensors.values_per_token ? line.state_index : nullptr,
                       line.trajectory_steps, line.trajectory_offsets[g],
                       line.trajectory_offsets[g + 1],
                       bootstrap == nullptr ? 0.0 : static_cast<double>(bootstrap[g]), config.gamma,
                       config.lam, a, r));
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
      Spread all{};
      for (int64_t b = 0; b < tasks; ++b) merge(all, spreads[b]);
      whiten_members(a, all, line.trajectory_steps, num_members, num_steps, threads);
    }
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
