// Tokens of a masked batch as bits, in which a block finds where steps begin.
#pragma once

#include "masks.cuh"
#include "spans.cuh"

namespace steppo::cuda {

constexpr int kTileThreads = 256;
constexpr int kTile = kTileThreads * kMaskBits;

// A word a thread, whose lowest bit is the first of its tokens.
struct MaskTile {
  unsigned actions[kTileThreads];
  unsigned row_begins[kTileThreads];
  unsigned step_begins[kTileThreads];
};

// The first row that does not begin before a token. All threads of a block call it.
STEPPO_DEVICE std::int64_t first_row(const MaskedRows& rows, std::int64_t token) {
  std::int64_t low = 0, high = rows.num_rows;
  while (low < high) {
    // A search among as many places as there are threads.
    const std::int64_t apart = (high - low + kTileThreads - 1) / kTileThreads;
    const std::int64_t row = low + threadIdx.x * apart;
    const int below = __syncthreads_count(row < high && rows.row_offsets[row] < token);
    if (below == 0) break;
    high = end_of(low, below * apart, high);
    low += (below - 1) * apart + 1;
  }
  return low;
}

// Marks where rows from `row` on begin in a tile; returns the first one behind it.
STEPPO_DEVICE std::int64_t mark_rows(const MaskedRows& rows, std::int64_t row, std::int64_t begin,
                                     MaskTile& tile) {
  const std::int64_t end = end_of(begin, kTile, rows.num_tokens);
  for (;;) {
    const std::int64_t mine = row + threadIdx.x;
    const std::int64_t at = mine < rows.num_rows ? rows.row_offsets[mine] : end;
    if (at < end) {
      const int place = static_cast<int>(at - begin);
      // Rows without a token begin at the same one.
      atomicOr(&tile.row_begins[place / kMaskBits], 1u << place % kMaskBits);
    }
    const int found = __syncthreads_count(at < end);
    row += found;
    if (found < kTileThreads) return row;
  }
}

// Fills a tile whose first token is `begin`, `row` the first row that does not begin before it;
// returns the first row behind the tile. Each thread can read its own words; others see them after
// a barrier. All threads of a block call it.
STEPPO_DEVICE std::int64_t read_tile(const MaskedRows& rows, std::int64_t row, std::int64_t begin,
                                     bool wide, MaskTile& tile) {
  const int word = threadIdx.x;
  const std::int64_t first = begin + word * kMaskBits;
  const unsigned actions = mask_bits(rows.mask, first, 0, rows.num_tokens, wide);
  // A thread may still read the tile before.
  __syncthreads();
  tile.actions[word] = actions;
  tile.row_begins[word] = 0;
  __syncthreads();
  row = mark_rows(rows, row, begin, tile);
  unsigned before = begin > 0 && is_set(rows.mask, begin - 1);
  if (word > 0) before = tile.actions[word - 1] >> (kMaskBits - 1);
  unsigned begins = ~(actions << 1 | before) | tile.row_begins[word];
  if (rows.boundaries != nullptr) {
    begins |= mask_bits(rows.boundaries, first, 0, rows.num_tokens, wide);
  }
  tile.step_begins[word] = actions & begins;
  return row;
}

}  // namespace steppo::cuda
