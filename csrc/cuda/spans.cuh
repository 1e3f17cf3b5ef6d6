// How blocks share the tokens of a batch, and how one launch leaves whole numbers of its blocks to
// the next: numbering needs what was counted before, and no block waits for another.
#pragma once

#include "launch.h"
#include "scan.cuh"
#include "steppo/cuda.h"

namespace steppo::cuda {

// No more blocks than this have room for their numbers in a workspace.
constexpr int kMostBlocks = 1024;
constexpr int kFields = Workspace::kPartials / kMostBlocks;

// Each block takes so many tokens, whole tiles of them, and the last one what is left.
struct Spans {
  std::int64_t blocks, tokens;
};

// There is a block even without tokens: an operator writes more than tokens.
inline Spans spans_of(std::int64_t num_tokens, std::int64_t tile) {
  const std::int64_t tiles = num_tokens > 0 ? ceil_div(num_tokens, tile) : 1;
  const std::int64_t each = ceil_div(tiles, most_blocks(kMostBlocks));
  return {ceil_div(tiles, each), each * tile};
}

// The end of a part of [0, size) that has `length` from `begin` on.
STEPPO_DEVICE std::int64_t end_of(std::int64_t begin, std::int64_t length, std::int64_t size) {
  return begin + length < size ? begin + length : size;
}

// Leaves a number of this block. A workspace holds fp64, in which they are exact below 2^53.
template <int field>
STEPPO_DEVICE void leave(Workspace* workspace, std::int64_t number) {
  static_assert(field < kFields, "a workspace has no room for it");
  workspace->partials[field * kMostBlocks + blockIdx.x] = static_cast<double>(number);
}

// What the numbers of the first blocks join to. All threads of a block call it.
template <int threads, class Join, int field>
STEPPO_DEVICE std::int64_t join_first(const Workspace* workspace, int blocks, std::int64_t none) {
  std::int64_t joined = none;
  for (int b = threadIdx.x; b < blocks; b += threads) {
    const double number = workspace->partials[field * kMostBlocks + b];
    joined = Join::of(joined, static_cast<std::int64_t>(number));
  }
  return join_block<threads, Join>(joined, none);
}

}  // namespace steppo::cuda
