// Rows that the threads of a block take together: each thread some of the columns, of every row the
// same.
#pragma once

#include "packs.cuh"

namespace steppo::cuda {

// Columns that a block takes of a row: `packs` loads of each of its threads.
template <class In, int threads, int packs>
constexpr int kColumns = threads * packs * kPack<In>;

// The columns of a thread in a row.
template <class In, int threads, int packs, bool is_wide>
struct ThreadColumns {
  int first, size;

  STEPPO_MEMBER ThreadColumns(int begin, int row_size)
      : first(begin + static_cast<int>(threadIdx.x) * kPack<In>), size(row_size) {}

  STEPPO_MEMBER int at(int p) const { return first + p * kColumns<In, threads, 1>; }

  // Loads them; what lies behind the row is 0. No other block reads the same soon.
  STEPPO_MEMBER void load(const In* row, Pack<In, kPack<In>> (&to)[packs]) const {
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      if constexpr (is_wide) {
        to[p] = {};
        if (at(p) < size) {
          to[p] = load_past_l1(reinterpret_cast<const Pack<In, kPack<In>>*>(row + at(p)));
        }
      } else {
#pragma unroll
        for (int j = 0; j < kPack<In>; ++j) to[p].at[j] = at(p) + j < size ? row[at(p) + j] : In{};
      }
    }
  }
};

template <class In, int packs>
struct RowOf {
  RowValue<In> at[packs][kPack<In>];
};

// Adds a row times a factor.
template <int packs, class In>
STEPPO_DEVICE void add_row(const Pack<In, kPack<In>> (&row)[packs], RowValue<In> factor,
                           RowOf<In, packs>& sum) {
#pragma unroll
  for (int p = 0; p < packs; ++p) {
    RowValue<In> x[kPack<In>];
    unpack(row[p], x);
#pragma unroll
    for (int j = 0; j < kPack<In>; ++j) sum.at[p][j] += factor * x[j];
  }
}

template <int packs, class In>
STEPPO_DEVICE RowValue<In> product_of(const Pack<In, kPack<In>> (&row)[packs],
                                      const Pack<In, kPack<In>> (&other)[packs]) {
  RowValue<In> sum = 0;
#pragma unroll
  for (int p = 0; p < packs; ++p) {
    RowValue<In> x[kPack<In>], y[kPack<In>];
    unpack(row[p], x);
    unpack(other[p], y);
#pragma unroll
    for (int j = 0; j < kPack<In>; ++j) sum += x[j] * y[j];
  }
  return sum;
}

// What threads have of the products of some rows: sums of a call's warps, of two calls in turn.
template <class Value, int rows, int warps>
struct alignas(16) WarpSums {
  Value at[2][rows][warps];
};

// The sums over the block: lane k of every warp gets that of row k. A block is ahead of the slowest
// of its threads by one call at most.
template <int threads, int rows, class Value>
STEPPO_DEVICE Value sum_over_block(const Value (&mine)[rows], unsigned call) {
  constexpr int kWarps = threads / kWarp;
  using Sums = WarpSums<Value, rows, kWarps>;
  STEPPO_SHARED(Sums, sums);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < rows; ++k) {
    const Value sum = sum_of_lanes<kWarp>(mine[k]);
    if (lane == k) sums.at[call % 2][k][warp] = sum;
  }
  __syncthreads();
  Value total = 0;
  if (lane < rows) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums.at[call % 2][lane][w];
  }
  return total;
}

}  // namespace steppo::cuda
