// Runs of ones as steps: see steppo_kernels/layout/segment.py.
#include "mask_tile.cuh"
#include "trajectories.h"

namespace steppo::cuda {
namespace {

// What the blocks of the first launch leave: steps that begin in them, and action tokens.
constexpr int kSteps = 0, kActions = 1;
// Ids that a thread writes at once, 16 bytes.
constexpr int kIds = 4;

// What an operator writes of its runs; what is null is not wanted.
struct RunOutputs {
  std::int32_t* step_ids;
  std::int64_t* row_steps;
  std::int64_t* counts;
  std::int64_t* token_index;
  std::int64_t* step_offsets;
  std::int64_t* step_starts;
};

// Numbers of steps and of action tokens in one: a tile has no more than 4096 of either.
STEPPO_DEVICE int both(unsigned step_begins, unsigned actions) {
  return __popc(step_begins) << 16 | __popc(actions);
}
STEPPO_DEVICE int steps_in(int both) { return both >> 16; }
STEPPO_DEVICE int actions_in(int both) { return both & 0xFFFF; }

struct Before {
  int at[kTileThreads];
};

// What begins before a token of a tile, which lies in this word at this bit.
STEPPO_DEVICE int before_token(const MaskTile& tile, const Before& before, int word, int bit) {
  const unsigned below = (1u << bit) - 1;
  return before.at[word] + both(tile.step_begins[word] & below, tile.actions[word] & below);
}

// Writes the ids of kIds tokens of a tile from `place` on, which lie in one word. `step` is the
// number of the first step that begins in the tile, and `left` the number of tokens from there on.
STEPPO_DEVICE void write_ids(const MaskTile& tile, const Before& before, int place,
                             std::int64_t step, std::int32_t* step_ids, std::int64_t left,
                             bool wide) {
  const int word = place / kMaskBits, bit = place % kMaskBits;
  const unsigned actions = tile.actions[word], begins = tile.step_begins[word];
  const auto first = static_cast<std::int32_t>(step + steps_in(before.at[word]));
  // Without a branch: masks may be anything.
  const auto id_at = [&](int k) {
    const int number = first + __popc(begins & ((2u << (bit + k)) - 1));
    return number * static_cast<int>(actions >> (bit + k) & 1) - 1;
  };
  if (wide && place + kIds <= left) {
    Pack<std::int32_t, kIds> ids;
#pragma unroll
    for (int k = 0; k < kIds; ++k) ids.at[k] = id_at(k);
    store_once(reinterpret_cast<decltype(ids)*>(step_ids + place), ids);
    return;
  }
#pragma unroll 1
  for (int k = 0; k < kIds && place + k < left; ++k) step_ids[place + k] = id_at(k);
}

// Writes an action token of a tile, and where its step begins if that is here.
STEPPO_DEVICE void write_action(const MaskTile& tile, const Before& before, int place,
                                std::int64_t begin, std::int64_t step, std::int64_t rank,
                                const RunOutputs& out) {
  const int word = place / kMaskBits, bit = place % kMaskBits;
  if ((tile.actions[word] >> bit & 1) == 0) return;
  const int here = before_token(tile, before, word, bit);
  rank += actions_in(here);
  out.token_index[rank] = begin + place;
  if ((tile.step_begins[word] >> bit & 1) == 0) return;
  step += steps_in(here);
  out.step_offsets[step] = rank;
  out.step_starts[step] = begin + place;
}

// The first launch counts: the number of a step depends on all tokens before it.
__global__ void __launch_bounds__(kTileThreads, 4)
    count_runs_kernel(MaskedRows rows, std::int64_t span, bool wide, Workspace* workspace) {
  STEPPO_SHARED(MaskTile, tile);
  const std::int64_t begin = blockIdx.x * span, end = end_of(begin, span, rows.num_tokens);
  std::int64_t row = first_row(rows, begin), steps = 0, actions = 0;
  for (std::int64_t at = begin; at < end; at += kTile) {
    row = read_tile(rows, row, at, wide, tile);
    steps += __popc(tile.step_begins[threadIdx.x]);
    actions += __popc(tile.actions[threadIdx.x]);
  }
  steps = join_block<kTileThreads, Sum>(steps, std::int64_t{0});
  actions = join_block<kTileThreads, Sum>(actions, std::int64_t{0});
  if (threadIdx.x > 0) return;
  leave<kSteps>(workspace, steps);
  leave<kActions>(workspace, actions);
}

// The second launch reads the same once more and numbers it.
__global__ void __launch_bounds__(kTileThreads, 4)
    number_runs_kernel(MaskedRows rows, RunOutputs out, std::int64_t span, bool wide_masks,
                       bool wide_ids, const Workspace* workspace) {
  STEPPO_SHARED(MaskTile, tile);
  STEPPO_SHARED(Before, before);
  const std::int64_t begin = blockIdx.x * span, end = end_of(begin, span, rows.num_tokens);
  std::int64_t row = first_row(rows, begin);
  std::int64_t step = join_first<kTileThreads, Sum, kSteps>(workspace, blockIdx.x, 0);
  std::int64_t rank = join_first<kTileThreads, Sum, kActions>(workspace, blockIdx.x, 0);
  for (std::int64_t at = begin; at < end; at += kTile) {
    const std::int64_t next_row = read_tile(rows, row, at, wide_masks, tile);
    const int mine = both(tile.step_begins[threadIdx.x], tile.actions[threadIdx.x]);
    const Scanned<int> found = scan_block<kTileThreads, Sum>(mine, 0);
    before.at[threadIdx.x] = found.before;
    __syncthreads();
    for (row += threadIdx.x; out.row_steps != nullptr && row < next_row; row += kTileThreads) {
      const int place = static_cast<int>(rows.row_offsets[row] - at);
      const int here = before_token(tile, before, place / kMaskBits, place % kMaskBits);
      out.row_steps[row] = step + steps_in(here);
    }
    const std::int64_t left = rows.num_tokens - at;
    for (int place = threadIdx.x * kIds; out.step_ids != nullptr && place < kTile;
         place += kTileThreads * kIds) {
      write_ids(tile, before, place, step, out.step_ids + at, left, wide_ids);
    }
    for (int place = threadIdx.x; out.token_index != nullptr && place < kTile;
         place += kTileThreads) {
      write_action(tile, before, place, at, step, rank, out);
    }
    row = next_row;
    step += steps_in(found.all);
    rank += actions_in(found.all);
  }
  if (blockIdx.x + 1 != gridDim.x) return;
  // The rows that are left have no token.
  for (row += threadIdx.x; out.row_steps != nullptr && row <= rows.num_rows; row += kTileThreads) {
    out.row_steps[row] = step;
  }
  if (threadIdx.x > 0) return;
  if (out.step_offsets != nullptr) out.step_offsets[step] = rank;
  if (out.counts == nullptr) return;
  out.counts[0] = rank;
  out.counts[1] = -1;
  out.counts[2] = step;
}

void number_runs(const Launcher& launch, const MaskedRows& rows, const RunOutputs& out,
                 const Place& place) {
  const Spans spans = spans_of(rows.num_tokens, kTile);
  const bool wide_masks = is_wide(rows.mask) && is_wide(rows.boundaries);
  auto* const workspace = static_cast<Workspace*>(place.workspace);
  launch(listed<count_runs_kernel>(), spans.blocks, kTileThreads, rows, spans.tokens, wide_masks,
         workspace);
  launch(listed<number_runs_kernel>(), spans.blocks, kTileThreads, rows, out, spans.tokens,
         wide_masks, is_wide(out.step_ids), workspace);
}

}  // namespace

void segment_mask(const MaskedRows& rows, const Segments& out, const Place& place) {
  const Launcher launch("segment_mask", place);
  number_runs(launch, rows, {out.step_ids, out.row_steps, out.counts, nullptr, nullptr, nullptr},
              place);
}

void count_steps(const MaskedRows& rows, const RowCounts& out, const Place& place) {
  const Launcher launch("count_steps", place);
  number_runs(launch, rows, {nullptr, out.row_steps, out.counts, nullptr, nullptr, nullptr}, place);
}

// The third launch is one over steps, whose ends other blocks have written.
void lay_out_runs(const MaskedRows& rows, const RunLayout& out, const Place& place) {
  const Launcher launch("lay_out_runs", place);
  number_runs(launch, rows,
              {out.step_ids, nullptr, nullptr, out.token_index, out.step_offsets, out.step_starts},
              place);
  launch_trajectories(
      launch, out.row_steps, rows.num_rows, nullptr, out.step_offsets,
      {out.trajectory_steps, out.trajectory_counts, out.step_rows, nullptr, out.step_lengths});
}

}  // namespace steppo::cuda
