// Step segmentation: see steppo_kernels/layout/segment.py. Every operator first counts by block,
// then numbers each block from the counts before it, so that blocks are independent.
#include <algorithm>

#include "runs.h"
#include "steppo/markers.h"

namespace steppo::cpu::STEPPO_ISA {
namespace {

// Calls body(first, last) with the parts of [begin, end) that lie in one row.
template <class F>
void for_rows(const int64_t* row_offsets, int64_t num_rows, int64_t begin, int64_t end, F&& body) {
  int64_t row = first_not_below(num_rows, begin + 1, [&](int64_t r) { return row_offsets[r + 1]; });
  for (; row < num_rows && row_offsets[row] < end; ++row) {
    const int64_t first = row_offsets[row] > begin ? row_offsets[row] : begin;
    const int64_t last = row_offsets[row + 1] < end ? row_offsets[row + 1] : end;
    if (first < last) body(row_offsets[row], first, last);
  }
}

// Calls on_part(step, first, last, is_new) for the parts of [begin, end) that lie in one step,
// whose numbers go on from `number`, and on_gap(first, last) for what lies in none. A part is not
// new where its step began before. Returns the number of steps after the last one.
template <class OnPart, class OnGap>
int64_t for_parts(const MaskedRows& rows, int64_t begin, int64_t end, int64_t number,
                  OnPart&& on_part, OnGap&& on_gap) {
  const bool* const boundaries = rows.boundaries;
  for_rows(rows.row_offsets, rows.num_rows, begin, end,
           [&](int64_t row, int64_t first, int64_t last) {
             const bool open = first > row && is_set(rows.mask, first - 1);
             const auto on_run = [&](Run run) {
               // A run that began in the block before goes on with the number given there.
               const bool goes_on = open && run.begin == first;
               for (int64_t part = run.begin; part < run.end;) {
                 const bool is_new =
                     !(goes_on && part == first) || (boundaries != nullptr && boundaries[part]);
                 if (is_new) ++number;
                 const int64_t next =
                     boundaries == nullptr ? run.end : find_byte(boundaries, 1, part + 1, run.end);
                 on_part(number - 1, part, next, is_new);
                 part = next;
               }
             };
             for_runs(rows.mask, first, last, open, on_run, on_gap);
           });
  return number;
}

// Counts the steps that begin in [begin, end) and its action tokens.
RunCounts count_parts(const MaskedRows& rows, int64_t begin, int64_t end) {
  RunCounts all;
  if (rows.boundaries == nullptr) {
    for_rows(rows.row_offsets, rows.num_rows, begin, end,
             [&](int64_t row, int64_t first, int64_t last) {
               const bool open = first > row && is_set(rows.mask, first - 1);
               const RunCounts part = count_runs(rows.mask, first, last, open);
               all.runs += part.runs;
               all.tokens += part.tokens;
             });
    return all;
  }
  const auto add = [&](int64_t, int64_t first, int64_t last, bool) { all.tokens += last - first; };
  all.runs = for_parts(rows, begin, end, 0, add, [](int64_t, int64_t) {});
  return all;
}

// Sums counts[0..blocks) into offsets in place; returns the total.
int64_t prefix(int64_t* counts, int64_t blocks) {
  int64_t total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t count = counts[b];
    counts[b] = total;
    total += count;
  }
  return total;
}

// Counts the steps that begin in each block and its action tokens.
void count_blocks(const MaskedRows& rows, Buffer<int64_t>& steps, Buffer<int64_t>& actions,
                  int threads) {
  parallel_blocks(rows.num_tokens, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
    const RunCounts found = count_parts(rows, begin, end);
    steps[b] = found.runs;
    actions[b] = found.tokens;
  });
}

// The number of the first step of each row: one more than the last id before it.
void steps_before_rows(const int32_t* step_ids, const int64_t* row_offsets, int64_t num_rows,
                       int64_t num_steps, int64_t* row_steps, int threads) {
  row_steps[num_rows] = num_steps;
  parallel_blocks(num_rows, 256, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      // Rows without a step take the number of the next row that has one.
      int64_t at = row_offsets[row];
      const int64_t last = row_offsets[row + 1];
      while (at < last && step_ids[at] < 0) ++at;
      row_steps[row] = at < last ? step_ids[at] : -1;
    }
  });
  for (int64_t row = num_rows; row-- > 0;) {
    if (row_steps[row] < 0) row_steps[row] = row_steps[row + 1];
  }
}

}  // namespace

void segment_mask(const MaskedRows& rows, const Segments& out, const Place& place) {
  const int64_t num_tokens = rows.num_tokens;
  const int threads = worthwhile_threads(num_tokens / 2, place.threads);
  const int64_t blocks = ceil_div(num_tokens, kBlock);
  Buffer<int64_t> numbers(blocks), actions(blocks);
  count_blocks(rows, numbers, actions, threads);
  const int64_t num_steps = prefix(numbers.get(), blocks);
  out.counts[0] = prefix(actions.get(), blocks);
  out.counts[1] = -1;
  out.counts[2] = num_steps;
  parallel_blocks(num_tokens, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
    for_parts(
        rows, begin, end, numbers[b],
        [&](int64_t step, int64_t first, int64_t last, bool) {
          fill(out.step_ids, first, last, static_cast<int32_t>(step));
        },
        [&](int64_t first, int64_t last) { fill(out.step_ids, first, last, int32_t{-1}); });
  });
  steps_before_rows(out.step_ids, rows.row_offsets, rows.num_rows, num_steps, out.row_steps,
                    threads);
}

void count_steps(const MaskedRows& rows, const RowCounts& out, const Place& place) {
  const int threads = worthwhile_threads(rows.num_tokens / 2, place.threads);
  Buffer<int64_t> actions(rows.num_rows);
  parallel_for(rows.num_rows, threads, [&](int64_t row) {
    const RunCounts found = count_parts(rows, rows.row_offsets[row], rows.row_offsets[row + 1]);
    out.row_steps[row] = found.runs;
    actions[row] = found.tokens;
  });
  const int64_t steps = prefix(out.row_steps, rows.num_rows);
  out.row_steps[rows.num_rows] = steps;
  out.counts[0] = prefix(actions.get(), rows.num_rows);
  out.counts[1] = -1;
  out.counts[2] = steps;
}

void lay_out_runs(const MaskedRows& rows, const RunLayout& out, const Place& place) {
  const int64_t num_tokens = rows.num_tokens;
  const int threads = worthwhile_threads(num_tokens, place.threads);
  const int64_t blocks = ceil_div(num_tokens, kBlock);
  Buffer<int64_t> numbers(blocks), ranks(blocks);
  count_blocks(rows, numbers, ranks, threads);
  prefix(numbers.get(), blocks);
  prefix(ranks.get(), blocks);
  parallel_blocks(num_tokens, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
    int64_t rank = ranks[b];
    for_parts(
        rows, begin, end, numbers[b],
        [&](int64_t step, int64_t first, int64_t last, bool is_new) {
          if (is_new) {
            out.step_offsets[step] = rank;
            out.step_starts[step] = first;
          }
          fill(out.step_ids, first, last, static_cast<int32_t>(step));
          int64_t* const index = out.token_index + rank;
          const int64_t length = last - first;
          for (int64_t k = 0; k < length; ++k) index[k] = first + k;
          rank += length;
        },
        [&](int64_t first, int64_t last) { fill(out.step_ids, first, last, int32_t{-1}); });
  });
  out.step_offsets[out.num_steps] = out.num_actions;
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    const int64_t begin = out.row_steps[row], end = out.row_steps[row + 1];
    for (int64_t s = begin; s < end; ++s) {
      out.step_lengths[s] = static_cast<int32_t>(out.step_offsets[s + 1] - out.step_offsets[s]);
      out.trajectory_steps[s] = s;
      out.trajectory_counts[s] = static_cast<int32_t>(end - begin);
      out.step_rows[s] = row;
    }
  }
}

void segment_ids(const NumberedRows& rows, const Segments& out, const Place& place) {
  const int64_t num_tokens = rows.num_tokens, num_rows = rows.num_rows;
  const int threads = worthwhile_threads(num_tokens / 2, place.threads);
  // Rows are the blocks: an id is new if it is above all before it in its row.
  Buffer<int64_t> actions(num_rows), decreasing(num_rows);
  parallel_for(num_rows, threads, [&](int64_t row) {
    int64_t largest = -1, steps = 0, found = 0, bad = num_tokens;
    for (int64_t i = rows.row_offsets[row]; i < rows.row_offsets[row + 1]; ++i) {
      if (rows.ids[i] < 0) continue;
      ++found;
      if (rows.ids[i] > largest) {
        ++steps;
        largest = rows.ids[i];
      } else if (rows.ids[i] < largest && bad == num_tokens) {
        bad = i;
      }
    }
    out.row_steps[row] = steps;
    actions[row] = found;
    decreasing[row] = bad;
  });
  int64_t bad = num_tokens;
  for (int64_t row = 0; row < num_rows; ++row) {
    if (decreasing[row] < bad) bad = decreasing[row];
  }
  const int64_t number = prefix(out.row_steps, num_rows);
  out.row_steps[num_rows] = number;
  out.counts[0] = prefix(actions.get(), num_rows);
  out.counts[1] = bad == num_tokens ? -1 : bad;
  out.counts[2] = number;
  parallel_for(num_rows, threads, [&](int64_t row) {
    int64_t largest = -1, step = out.row_steps[row] - 1;
    for (int64_t i = rows.row_offsets[row]; i < rows.row_offsets[row + 1]; ++i) {
      if (rows.ids[i] > largest) {
        ++step;
        largest = rows.ids[i];
      }
      out.step_ids[i] = rows.ids[i] < 0 ? -1 : static_cast<int32_t>(step);
    }
  });
}

void segment_rows(const StepRows& rows, const Segments& out, const Place& place) {
  const int64_t num_rows = rows.num_rows, row_length = rows.row_length;
  const int threads = worthwhile_threads(num_rows * row_length / 2, place.threads);
  Buffer<int64_t> actions(num_rows);
  parallel_for(num_rows, threads, [&](int64_t row) {
    int32_t* to = out.step_ids + row * row_length;
    int64_t found = 0;
    if (rows.valid == nullptr || rows.valid[row]) {
      // Without a branch: masks may be anything.
      const bool* in = rows.mask + row * row_length;
      const int32_t above = static_cast<int32_t>(row) + 1;
      for (int64_t t = 0; t < row_length; ++t) to[t] = above * in[t] - 1;
      found = count_runs(rows.mask, row * row_length, (row + 1) * row_length, false).tokens;
    } else {
      fill(to, 0, row_length, int32_t{-1});
    }
    actions[row] = found;
    out.row_steps[row] = row;
  });
  out.row_steps[num_rows] = num_rows;
  out.counts[0] = prefix(actions.get(), num_rows);
  out.counts[1] = -1;
  out.counts[2] = num_rows;
}

void mark_actions(const Markers& markers, const Place& place) {
  const Sequences opening{markers.starts, markers.start_offsets, markers.num_starts};
  const Sequences stopping{markers.stops, markers.stop_offsets, markers.num_stops};
  const int64_t* const token_ids = markers.token_ids;
  const int threads = worthwhile_threads(markers.row_offsets[markers.num_rows], place.threads);
  parallel_for(markers.num_rows, threads, [&](int64_t row) {
    const int64_t first = markers.row_offsets[row], last = markers.row_offsets[row + 1];
    bool open = false;
    for (int64_t i = first; i < last; ++i) {
      if (open && i > first) open = !contains(markers.ends, markers.num_ends, token_ids[i - 1]);
      if (!open) open = starts_behind(token_ids, first, last, i, opening);
      if (open) open = longest_at(token_ids, i, last, stopping) == 0;
      markers.mask[i] = open;
    }
  });
}

void compact(const Compaction& c, const Place& place) {
  const int64_t num_tokens = c.num_tokens, num_steps = c.num_steps;
  const int threads = worthwhile_threads(num_tokens / 2, place.threads);
  const int64_t blocks = ceil_div(num_tokens, kBlock);
  Buffer<int64_t> ranks(blocks + 1), last_ids(blocks);
  parallel_blocks(num_tokens, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
    int64_t found = 0, last = -1;
    for (int64_t i = begin; i < end; ++i) {
      found += c.step_ids[i] >= 0;
      last = c.step_ids[i] > last ? c.step_ids[i] : last;
    }
    ranks[b] = found;
    last_ids[b] = last;
  });
  ranks[blocks] = prefix(ranks.get(), blocks);
  int64_t last = -1;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t here = last_ids[b];
    last_ids[b] = last;
    last = here > last ? here : last;
  }
  parallel_blocks(num_tokens, kBlock, threads, [&](int64_t b, int64_t begin, int64_t end) {
    int64_t rank = ranks[b], id = last_ids[b];
    const int64_t last_rank = ranks[b + 1];
    // Most batches of tokens lie within a step or outside of all.
    constexpr int64_t kBatch = 32;
    for (int64_t i = begin; i < end;) {
      const int64_t stop = i + kBatch < end ? i + kBatch : end;
      int same = stop - i == kBatch;
      if (same) {
        for (int k = 0; k < kBatch; ++k) same &= c.step_ids[i + k] == c.step_ids[i];
      }
      if (same && c.step_ids[i] >= 0) {
        while (id < c.step_ids[i]) c.step_offsets[++id] = rank;
        for (int k = 0; k < kBatch; ++k) c.token_index[rank + k] = i + k;
        rank += kBatch;
      }
      // Each token is written and kept only if it is an action's: a branch would be a gamble.
      for (; !same && i < stop && rank < last_rank; ++i) {
        c.token_index[rank] = i;
        while (id < c.step_ids[i]) c.step_offsets[++id] = rank;
        rank += c.step_ids[i] >= 0;
      }
      i = stop;
    }
  });
  for (int64_t s = last + 1; s <= num_steps; ++s) c.step_offsets[s] = c.num_actions;
  for (int64_t s = 0; s < num_steps; ++s) {
    const int64_t first = c.step_offsets[s], length = c.step_offsets[s + 1] - first;
    c.step_lengths[s] = static_cast<int32_t>(length);
    // Positions ascend here, so that the ends of a step tell whether they follow each other.
    const bool is_whole =
        length > 0 && c.token_index[first + length - 1] - c.token_index[first] == length - 1;
    c.step_starts[s] = is_whole ? c.token_index[first] : -1;
  }
}

void row_trajectories(const RowTrajectories& c, const Place&) {
  for (int64_t row = 0; row < c.num_rows; ++row) {
    const int64_t begin = c.row_steps[row], end = c.row_steps[row + 1];
    for (int64_t s = begin; s < end; ++s) {
      c.trajectory_steps[s] = s;
      c.trajectory_counts[s] = static_cast<int32_t>(end - begin);
      c.state_index[s] = c.token_index[c.step_offsets[s]];
      c.step_rows[s] = row;
    }
  }
}

}  // namespace steppo::cpu::STEPPO_ISA
