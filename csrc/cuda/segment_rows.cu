// Rows that are steps: see steppo_kernels/layout/segment.py.
#include "last_block.cuh"
#include "masks.cuh"
#include "spans.cuh"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 256;
// Tokens that a thread takes at once: 16 bytes of ids.
constexpr int kTokens = 4;
constexpr int kTile = kThreads * kTokens;

// One launch: only the number of action tokens needs all blocks, and the last one adds it up.
__global__ void __launch_bounds__(kThreads, 4)
    segment_rows_kernel(StepRows rows, Segments out, std::int64_t span, bool wide,
                        Workspace* workspace) {
  const std::int64_t num_rows = rows.num_rows, num_tokens = num_rows * rows.row_length;
  const std::int64_t begin = blockIdx.x * span, end = end_of(begin, span, num_tokens);
  std::int64_t found = 0;
  for (std::int64_t i = begin + threadIdx.x * kTokens; i < end; i += kTile) {
    const bool is_full = wide && i + kTokens <= end;
    Pack<unsigned char, kTokens> mask{};
    if (is_full) {
      mask = *reinterpret_cast<const Pack<unsigned char, kTokens>*>(rows.mask + i);
    } else {
#pragma unroll
      for (int k = 0; k < kTokens; ++k) mask.at[k] = i + k < end && is_set(rows.mask, i + k);
    }
    std::int64_t row = i / rows.row_length, left = (row + 1) * rows.row_length - i;
    Pack<std::int32_t, kTokens> ids;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const bool is_action = mask.at[k] != 0 && (rows.valid == nullptr || is_set(rows.valid, row));
      ids.at[k] = is_action ? static_cast<std::int32_t>(row) : -1;
      found += is_action;
      if (--left == 0) {
        ++row;
        left = rows.row_length;
      }
    }
    if (is_full) {
      *reinterpret_cast<Pack<std::int32_t, kTokens>*>(out.step_ids + i) = ids;
    } else {
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        if (i + k < end) out.step_ids[i + k] = ids.at[k];
      }
    }
  }
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t r = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; r <= num_rows;
       r += threads) {
    out.row_steps[r] = r;
  }
  found = join_block<kThreads, Sum>(found, std::int64_t{0});
  if (threadIdx.x == 0) leave<0>(workspace, found);
  if (!is_last_block(workspace->counters, gridDim.x)) return;
  found = join_first<kThreads, Sum, 0>(workspace, gridDim.x, 0);
  if (threadIdx.x > 0) return;
  out.counts[0] = found;
  out.counts[1] = -1;
  out.counts[2] = num_rows;
}

}  // namespace

void segment_rows(const StepRows& args, const Segments& out, const Place& place) {
  const Launcher launch("segment_rows", place);
  const Spans spans = spans_of(args.num_rows * args.row_length, kTile);
  const bool wide = is_wide(args.mask) && is_wide(out.step_ids);
  launch(listed<segment_rows_kernel>(), spans.blocks, kThreads, args, out, spans.tokens, wide,
         static_cast<Workspace*>(place.workspace));
}

}  // namespace steppo::cuda
