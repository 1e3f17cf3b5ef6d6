// Ids as steps: see steppo_kernels/layout/segment.py.
#include <algorithm>

#include "last_block.cuh"
#include "spans.cuh"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 256;
// Ids that a thread takes at once: 16 bytes of step ids.
constexpr int kIds = 4;
constexpr int kTile = kThreads * kIds;
// What the blocks of the first launch leave: action tokens, and the first id that is too small.
constexpr int kActions = 0, kDecreasing = 1;

struct Row {
  std::int64_t begin, end;
};

// The ids of a thread; no id is -1, and so are those outside of the row.
STEPPO_DEVICE Pack<std::int64_t, kIds> ids_at(const std::int64_t* ids, std::int64_t i, Row row,
                                              bool wide) {
  Pack<std::int64_t, kIds> found;
  const bool is_full = wide && i >= row.begin && i + kIds <= row.end;
#pragma unroll
  for (int k = 0; k < kIds; k += 2) {
    if (is_full) {
      const auto two = *reinterpret_cast<const Pack<std::int64_t, 2>*>(ids + i + k);
      found.at[k] = two.at[0];
      found.at[k + 1] = two.at[1];
    } else {
      for (int j = k; j < k + 2; ++j) {
        found.at[j] = i + j >= row.begin && i + j < row.end ? ids[i + j] : -1;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kIds; ++k) found.at[k] = Largest::of(found.at[k], std::int64_t{-1});
  return found;
}

// The largest id before those of this thread in its row, of which `largest` is that of the tiles
// before; becomes that of this tile too. All threads of a block call it.
STEPPO_DEVICE std::int64_t largest_before(const Pack<std::int64_t, kIds>& ids,
                                          std::int64_t& largest) {
  std::int64_t mine = -1;
#pragma unroll
  for (int k = 0; k < kIds; ++k) mine = Largest::of(mine, ids.at[k]);
  const auto found = scan_block<kThreads, Largest>(mine, std::int64_t{-1});
  const std::int64_t before = Largest::of(largest, found.before);
  largest = Largest::of(largest, found.all);
  return before;
}

// Where a tile begins that holds a token: at a multiple of what a thread takes.
STEPPO_DEVICE std::int64_t tile_of(std::int64_t token) { return token / kIds * kIds; }

// Makes first numbers of the steps that rows have, and the counts of what blocks left.
STEPPO_DEVICE void finish_counts(const NumberedRows& rows, const Segments& out,
                                 const Workspace* workspace) {
  std::int64_t steps = 0;
  for (std::int64_t begin = 0; begin < rows.num_rows; begin += kThreads) {
    const std::int64_t row = begin + threadIdx.x;
    const std::int64_t mine = row < rows.num_rows ? out.row_steps[row] : 0;
    const auto found = scan_block<kThreads, Sum>(mine, std::int64_t{0});
    if (row < rows.num_rows) out.row_steps[row] = steps + found.before;
    steps += found.all;
  }
  const std::int64_t actions = join_first<kThreads, Sum, kActions>(workspace, gridDim.x, 0);
  const std::int64_t decreasing =
      join_first<kThreads, Smallest, kDecreasing>(workspace, gridDim.x, rows.num_tokens);
  if (threadIdx.x > 0) return;
  out.row_steps[rows.num_rows] = steps;
  out.counts[0] = actions;
  out.counts[1] = decreasing == rows.num_tokens ? -1 : decreasing;
  out.counts[2] = steps;
}

// The first launch counts, a block a row: an id is new if it is above all before it in its row. The
// last block makes first numbers of the counts.
__global__ void __launch_bounds__(kThreads, 4)
    count_new_ids_kernel(NumberedRows rows, Segments out, bool wide, Workspace* workspace) {
  std::int64_t actions = 0, decreasing = rows.num_tokens;
  for (std::int64_t r = blockIdx.x; r < rows.num_rows; r += gridDim.x) {
    const Row row{rows.row_offsets[r], rows.row_offsets[r + 1]};
    std::int64_t largest = -1, steps = 0;
    for (std::int64_t tile = tile_of(row.begin); tile < row.end; tile += kTile) {
      const std::int64_t first = tile + threadIdx.x * kIds;
      const auto ids = ids_at(rows.ids, first, row, wide);
      std::int64_t before = largest_before(ids, largest);
#pragma unroll
      for (int k = 0; k < kIds; ++k) {
        if (ids.at[k] < 0) continue;
        ++actions;
        steps += ids.at[k] > before;
        if (ids.at[k] < before) decreasing = Smallest::of(decreasing, first + k);
        before = Largest::of(before, ids.at[k]);
      }
    }
    steps = join_block<kThreads, Sum>(steps, std::int64_t{0});
    if (threadIdx.x == 0) out.row_steps[r] = steps;
  }
  actions = join_block<kThreads, Sum>(actions, std::int64_t{0});
  decreasing = join_block<kThreads, Smallest>(decreasing, rows.num_tokens);
  if (threadIdx.x == 0) {
    leave<kActions>(workspace, actions);
    leave<kDecreasing>(workspace, decreasing);
  }
  if (is_last_block(workspace->counters, gridDim.x)) finish_counts(rows, out, workspace);
}

// The second launch reads the same once more and numbers it.
__global__ void __launch_bounds__(kThreads, 4)
    number_ids_kernel(NumberedRows rows, Segments out, bool wide_ids, bool wide_steps) {
  for (std::int64_t r = blockIdx.x; r < rows.num_rows; r += gridDim.x) {
    const Row row{rows.row_offsets[r], rows.row_offsets[r + 1]};
    std::int64_t largest = -1, step = out.row_steps[r] - 1;
    for (std::int64_t tile = tile_of(row.begin); tile < row.end; tile += kTile) {
      const std::int64_t first = tile + threadIdx.x * kIds;
      const auto ids = ids_at(rows.ids, first, row, wide_ids);
      std::int64_t before = largest_before(ids, largest);
      Pack<std::int32_t, kIds> steps;
      int found = 0;
#pragma unroll
      for (int k = 0; k < kIds; ++k) {
        found += ids.at[k] > before;
        steps.at[k] = found;
        before = Largest::of(before, ids.at[k]);
      }
      const Scanned<int> numbers = scan_block<kThreads, Sum>(found, 0);
      const auto here = static_cast<std::int32_t>(step + numbers.before);
#pragma unroll
      for (int k = 0; k < kIds; ++k) steps.at[k] = ids.at[k] < 0 ? -1 : here + steps.at[k];
      step += numbers.all;
      if (wide_steps && first >= row.begin && first + kIds <= row.end) {
        *reinterpret_cast<Pack<std::int32_t, kIds>*>(out.step_ids + first) = steps;
        continue;
      }
#pragma unroll
      for (int k = 0; k < kIds; ++k) {
        const std::int64_t i = first + k;
        if (i >= row.begin && i < row.end) out.step_ids[i] = steps.at[k];
      }
    }
  }
}

}  // namespace

void segment_ids(const NumberedRows& args, const Segments& out, const Place& place) {
  const Launcher launch("segment_ids", place);
  // There is a block even without rows, for the counts.
  const std::int64_t blocks = args.num_rows > 0 ? args.num_rows : 1;
  const bool wide = is_wide(args.ids);
  launch(listed<count_new_ids_kernel>(), std::min(blocks, most_blocks(kMostBlocks)), kThreads, args,
         out, wide, static_cast<Workspace*>(place.workspace));
  launch(listed<number_ids_kernel>(), args.num_rows, kThreads, args, out, wide,
         is_wide(out.step_ids));
}

}  // namespace steppo::cuda
