// Sums of rows of a matrix, each times a factor. A warp takes some neighbouring columns of a sum.
#pragma once

#include <algorithm>

#include "packs.cuh"

namespace steppo::cuda {

// Columns that a warp takes: 16 bytes a lane.
template <class In>
constexpr int kSlice = kWarp * kPack<In>;

// Slices of rows of a size; there is one even of rows without columns.
template <class In>
std::int64_t slices_of(std::int64_t size) {
  return std::max<std::int64_t>(ceil_div(size, kSlice<In>), 1);
}

// The columns of a lane, of which rows that are not made of packs may have fewer than of others.
// Neighbouring lanes take neighbours: packs or, without `is_wide`, numbers.
template <class In, bool is_wide>
struct LaneColumns {
  static constexpr int kCount = kPack<In>, kApart = is_wide ? 1 : kWarp;

  std::int64_t first, size;

  STEPPO_MEMBER LaneColumns(std::int64_t slice, std::int64_t row_size)
      : first(slice * kSlice<In> + threadIdx.x % kWarp * (is_wide ? kCount : 1)), size(row_size) {}

  // Of a pack, a lane has all or none.
  STEPPO_MEMBER bool has(int k) const { return first + (is_wide ? 0 : k * kApart) < size; }

  // Where a lane loads from in a row that begins at an address. Without a pack, it is the first one
  // of the row, which is there, and which nobody uses.
  STEPPO_MEMBER const In* of(const In* row) const { return row + (is_wide && !has(0) ? 0 : first); }
  STEPPO_MEMBER Pack<In, kCount> load(const In* from) const {
    if constexpr (is_wide) {
      return load_past_l1(reinterpret_cast<const Pack<In, kCount>*>(from));
    } else {
      Pack<In, kCount> numbers;
#pragma unroll
      for (int k = 0; k < kCount; ++k) numbers.at[k] = has(k) ? from[k * kApart] : In{};
      return numbers;
    }
  }

  template <class Out, class Value>
  STEPPO_MEMBER void store(Out* row, const Value (&numbers)[kCount]) const {
    if constexpr (is_wide) {
      constexpr int kAtOnce = kPack<Out> < kCount ? kPack<Out> : kCount;
#pragma unroll
      for (int part = 0; part < kCount; part += kAtOnce) {
        Value x[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) x[k] = numbers[part + k];
        auto* const to = reinterpret_cast<Pack<Out, kAtOnce>*>(row + first + part);
        if (has(0)) store_once(to, packed<Out>(x));
      }
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (has(k)) store_number(row + first + k * kApart, numbers[k]);
      }
    }
  }

  // The same at any address.
  template <class Value>
  STEPPO_MEMBER void store_singly(Value* row, const Value (&numbers)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (has(k)) row[first + k * kApart] = numbers[k];
    }
  }
};

// A sum in the columns of a lane, and that of the factors.
template <class In>
struct RowSum {
  RowValue<In> at[kPack<In>], of_factors;
};

// Up to `most` terms of a sum that are under way. Those of a warp, a row and a factor each, lie in
// its lanes. Tokens and ids, which rows are of, are below 2^31.
template <class In, bool is_wide, int most>
struct Terms {
  unsigned lanes;
  Pack<In, kPack<In>> rows[most];

  // Loads the rows of the first lanes of some, as many as there is room for. `from` is where this
  // lane loads from in row 0.
  STEPPO_MEMBER Terms(const In* from, std::int64_t stride, std::int32_t row, unsigned of_lanes,
                      const LaneColumns<In, is_wide>& columns) {
    unsigned left = of_lanes;
#pragma unroll
    for (int k = 0; k < most; ++k) {
      // Without a lane, any one: nothing is loaded.
      const std::int64_t at = __shfl_sync(kAllLanes, row, __ffs(static_cast<int>(left)) - 1);
      if (left != 0) rows[k] = columns.load(from + at * stride);
      left &= left - 1;
    }
    lanes = of_lanes & ~left;
  }

  // Adds the terms of some of the lanes to a sum, in their order.
  STEPPO_MEMBER void add(unsigned some, RowValue<In> factor, RowSum<In>& sum) const {
    unsigned left = lanes;
#pragma unroll
    for (int k = 0; k < most; ++k) {
      const unsigned lane = __ffs(static_cast<int>(left)) - 1;
      const RowValue<In> times = __shfl_sync(kAllLanes, factor, lane);
      if (left & -left & some) {
        RowValue<In> x[kPack<In>];
        unpack(rows[k], x);
#pragma unroll
        for (int j = 0; j < kPack<In>; ++j) sum.at[j] += times * x[j];
        sum.of_factors += times;
      }
      left &= left - 1;
    }
  }
};

}  // namespace steppo::cuda
