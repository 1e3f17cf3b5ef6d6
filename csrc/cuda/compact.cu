// The CSR form of step ids: see steppo_kernels/layout/segment.py.
#include "spans.cuh"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 256;
// Ids that a thread takes at once, 16 bytes.
constexpr int kIds = 4;
constexpr int kTile = kThreads * kIds;
// What the blocks of the first launch leave: action tokens, and the largest id, -1 for none.
constexpr int kActions = 0, kLastId = 1;

// The ids of a thread, -1 from `end` on.
STEPPO_DEVICE Pack<std::int32_t, kIds> ids_at(const Compaction& args, std::int64_t i,
                                              std::int64_t end, bool wide) {
  if (wide && i + kIds <= end) {
    return *reinterpret_cast<const Pack<std::int32_t, kIds>*>(args.step_ids + i);
  }
  Pack<std::int32_t, kIds> ids;
#pragma unroll
  for (int k = 0; k < kIds; ++k) ids.at[k] = i + k < end ? args.step_ids[i + k] : -1;
  return ids;
}

// The first launch counts: where a token goes depends on all tokens before it.
__global__ void __launch_bounds__(kThreads, 4)
    count_ids_kernel(Compaction args, std::int64_t span, bool wide, Workspace* workspace) {
  const std::int64_t begin = blockIdx.x * span, end = end_of(begin, span, args.num_tokens);
  std::int64_t found = 0, last = -1;
  for (std::int64_t i = begin + threadIdx.x * kIds; i < end; i += kTile) {
    const auto ids = ids_at(args, i, end, wide);
#pragma unroll
    for (int k = 0; k < kIds; ++k) {
      found += ids.at[k] >= 0;
      last = Largest::of(last, std::int64_t{ids.at[k]});
    }
  }
  found = join_block<kThreads, Sum>(found, std::int64_t{0});
  last = join_block<kThreads, Largest>(last, std::int64_t{-1});
  if (threadIdx.x > 0) return;
  leave<kActions>(workspace, found);
  leave<kLastId>(workspace, last);
}

// The second launch writes each action token, and where the steps begin: at the first token whose
// id is not below theirs, as steps may be empty.
__global__ void __launch_bounds__(kThreads, 4)
    place_ids_kernel(Compaction args, std::int64_t span, bool wide, const Workspace* workspace) {
  const std::int64_t begin = blockIdx.x * span, end = end_of(begin, span, args.num_tokens);
  std::int64_t rank = join_first<kThreads, Sum, kActions>(workspace, blockIdx.x, 0);
  std::int64_t last = join_first<kThreads, Largest, kLastId>(workspace, blockIdx.x, -1);
  for (std::int64_t tile = begin; tile < end; tile += kTile) {
    const std::int64_t first = tile + threadIdx.x * kIds;
    const auto ids = ids_at(args, first, end, wide);
    int found = 0, largest = -1;
#pragma unroll
    for (int k = 0; k < kIds; ++k) {
      found += ids.at[k] >= 0;
      largest = Largest::of(largest, ids.at[k]);
    }
    const Scanned<int> ranks = scan_block<kThreads, Sum>(found, 0);
    const Scanned<int> ends = scan_block<kThreads, Largest>(largest, -1);
    std::int64_t here = rank + ranks.before;
    std::int64_t step = Largest::of(last, std::int64_t{ends.before});
#pragma unroll
    for (int k = 0; k < kIds; ++k) {
      if (ids.at[k] < 0) continue;
      while (step < ids.at[k]) args.step_offsets[++step] = here;
      args.token_index[here++] = first + k;
    }
    rank += ranks.all;
    last = Largest::of(last, std::int64_t{ends.all});
  }
  // No token is left for the steps after the last id.
  last = join_first<kThreads, Largest, kLastId>(workspace, gridDim.x, -1);
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  const std::int64_t thread = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (std::int64_t s = last + 1 + thread; s <= args.num_steps; s += threads) {
    args.step_offsets[s] = args.num_actions;
  }
}

// The third launch is one over steps, whose ends other blocks may have written.
__global__ void __launch_bounds__(kThreads, 4) measure_kernel(Compaction args) {
  const std::int64_t s = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (s >= args.num_steps) return;
  const std::int64_t first = args.step_offsets[s], length = args.step_offsets[s + 1] - first;
  args.step_lengths[s] = static_cast<std::int32_t>(length);
  std::int64_t start = -1;
  if (length > 0) {
    const std::int64_t begin = args.token_index[first];
    // Positions ascend here, so that the ends of a step tell whether they follow each other.
    if (args.token_index[first + length - 1] - begin == length - 1) start = begin;
  }
  args.step_starts[s] = start;
}

}  // namespace

void compact(const Compaction& args, const Place& place) {
  const Launcher launch("compact", place);
  const Spans spans = spans_of(args.num_tokens, kTile);
  const bool wide = is_wide(args.step_ids);
  auto* const workspace = static_cast<Workspace*>(place.workspace);
  launch(listed<count_ids_kernel>(), spans.blocks, kThreads, args, spans.tokens, wide, workspace);
  launch(listed<place_ids_kernel>(), spans.blocks, kThreads, args, spans.tokens, wide, workspace);
  launch(listed<measure_kernel>(), ceil_div(args.num_steps, kThreads), kThreads, args);
}

}  // namespace steppo::cuda
