// Products of hidden states with the rows of the weight that their tokens keep, and what a step
// along a hidden state does to the log-prob: see steppo_kernels/backends/kept_operators.py.
//
// A token is a small attention, whose keys and values are the rows of its ids: a row is loaded
// once, multiplied with the hidden state, and added to a sum by its softmax, which goes along. A
// block takes the columns of a row together, so that the sum lies in registers. Long sets are
// divided into parts that a second launch joins.
#include <algorithm>
#include <limits>

#include "block_rows.cuh"
#include "launch.h"
#include "scan.cuh"
#include "softmax.cuh"
#include "steppo/cuda.h"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 256;
// Pairs of a part where nothing is joined.
constexpr std::int64_t kPart = 512;
// Blocks that are enough to keep every processor busy; fewer leave more of the work to each.
constexpr std::int64_t kMostBlocks = 2048, kFewest = 64;
// Rows of the weight that a block has under way.
template <int packs>
constexpr int kRowsAtOnce = packs > 2 ? 2 : 4;
// Blocks that share a processor: as many as there are registers for.
template <int threads, bool is_wide>
constexpr int kBlocks = (is_wide ? 2 : 1) * kThreads / threads;

// What a block takes at a time: some pairs of a set, from `first` of all pairs on.
struct Part {
  std::int64_t first;
  int row, token, number, count;
  bool is_all;
};

// The sets of the tokens of a tile, and how many parts those before a set and it have.
template <int threads>
struct Tile {
  std::int64_t firsts[threads], counts[threads], ends[threads];
  std::int32_t tokens[threads];
};

STEPPO_DEVICE std::int64_t parts_of(std::int64_t count, std::int64_t part) {
  return count > part ? (count + part - 1) / part : 1;
}

// Finds the sets of a tile, and returns how many parts they have. All threads call it.
template <int threads>
STEPPO_DEVICE std::int64_t read_tile(const KeptProduct& head, const Sets& sets, std::int64_t part,
                                     std::int64_t number, Tile<threads>& tile) {
  const std::int64_t row = number * threads + threadIdx.x;
  std::int64_t token = 0, first = 0, count = 0;
  if (row < head.num_rows) {
    token = head.rows[row];
    first = sets.offsets[token];
    count = sets.offsets[token + 1] - first;
  }
  const std::int64_t parts = row < head.num_rows ? parts_of(count, part) : 0;
  const Scanned<std::int64_t> found = scan_block<threads, Sum>(parts, std::int64_t{0});
  tile.firsts[threadIdx.x] = first;
  tile.counts[threadIdx.x] = count;
  tile.ends[threadIdx.x] = found.before + parts;
  tile.tokens[threadIdx.x] = static_cast<std::int32_t>(token);
  __syncthreads();
  return found.all;
}

// A part of those of a tile.
template <int threads>
STEPPO_DEVICE Part part_of(const Tile<threads>& tile, int item, int first_row, std::int64_t part) {
  int owner = 0;
#pragma unroll
  for (int apart = threads / 2; apart > 0; apart /= 2) {
    if (tile.ends[owner + apart - 1] <= item) owner += apart;
  }
  const std::int64_t number = item - (owner > 0 ? tile.ends[owner - 1] : 0);
  const std::int64_t left = tile.counts[owner] - number * part;
  return {tile.firsts[owner] + number * part,
          first_row + owner,
          tile.tokens[owner],
          static_cast<int>(number),
          static_cast<int>(left < part ? left : part),
          tile.counts[owner] <= part};
}

// Where a part leaves what is joined: the first one of a set at its row, the others at a slot that
// is theirs alone, as all of these begin at least a part away from each other.
STEPPO_DEVICE std::int64_t slot_of(std::int64_t first, std::int64_t part) { return first / part; }

// The softmax of a set so far, without its token: the largest logit, and a lane's part of the sum.
template <class Value>
struct Running {
  Value top, sum;
};

// e^(d * scale). The product is formed in fp64: in fp32 some temperatures would be out of range.
STEPPO_DEVICE float scaled_power(double d, double scale, float) {
  return fast_exp2(static_cast<float>(d * scale * 1.4426950408889634));
}
STEPPO_DEVICE double scaled_power(double d, double scale, double) { return std::exp(d * scale); }

// Moves to the logits of the lanes. Returns the power of each, and by what older ones shrink.
template <class Value>
STEPPO_DEVICE Value weigh(Value z, double scale, Running<Value>& so_far, Value& shrinks) {
  Value high = z;
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    const Value other = __shfl_xor_sync(kAllLanes, high, apart);
    high = other > high ? other : high;
  }
  shrinks = 1;
  if (high > so_far.top) {
    const double d = static_cast<double>(so_far.top) - static_cast<double>(high);
    shrinks = scaled_power(d, scale, Value{});
    so_far.sum *= shrinks;
    so_far.top = high;
  }
  const double d = static_cast<double>(z) - static_cast<double>(so_far.top);
  const Value e = scaled_power(d, scale, Value{});
  so_far.sum += e;
  return e;
}

// The factors of the token's own row and of the sum of the others in the gradient of its log-prob,
// (1 - p) w - sum of p_v w_v. What is left of 1 is formed of the others, so that it is exact where
// the token is certain.
struct Factors {
  double own, others;
};

STEPPO_DEVICE Factors factors_of(bool has_own, double own, double top, double sum,
                                 double temperature) {
  const double d = (own - top) / temperature;
  const double of_own = !has_own ? 0.0 : d > 0 ? 1.0 : std::exp(d);
  const double shift = has_own && d > 0 ? std::exp(-d) : 1.0;
  const double total = sum * shift + of_own;
  if (total == 0) return {0, 0};
  return {has_own ? sum * shift / total / temperature : 0.0, -shift / total / temperature};
}

// Writes a gradient of a log-prob: numbers of a sum times a factor and, where it has one, the row
// of the token itself.
template <int threads, int packs, bool is_wide, class In>
STEPPO_DEVICE void write_direction(RowValue<In>* to,
                                   const ThreadColumns<In, threads, packs, is_wide>& columns,
                                   const In* own_row, const Factors& factors,
                                   const RowOf<In, packs>& sum) {
  using Value = RowValue<In>;
  const Value own = static_cast<Value>(factors.own), others = static_cast<Value>(factors.others);
  Pack<In, kPack<In>> row[packs] = {};
  if (own != 0) columns.load(own_row, row);
#pragma unroll
  for (int p = 0; p < packs; ++p) {
    Value x[kPack<In>];
    unpack(row[p], x);
#pragma unroll
    for (int j = 0; j < kPack<In>; ++j) {
      x[j] = sum.at[p][j] * others + (own != 0 ? own * x[j] : Value(0));
    }
    if constexpr (is_wide) {
      if (columns.at(p) >= columns.size) continue;
#pragma unroll
      for (int part = 0; part < kPack<In>; part += kPack<Value>) {
        Value y[kPack<Value>];
#pragma unroll
        for (int j = 0; j < kPack<Value>; ++j) y[j] = x[part + j];
        auto* const pack = reinterpret_cast<Pack<Value, kPack<Value>>*>(to + columns.at(p) + part);
        store_once(pack, packed<Value>(y));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPack<In>; ++j) {
        if (columns.at(p) + j < columns.size) to[columns.at(p) + j] = x[j];
      }
    }
  }
}

STEPPO_DEVICE double temperature_of(const KeptRows& rows, std::int64_t row) {
  return rows.temperatures != nullptr ? rows.temperatures[row] : rows.temperature;
}

// Where in a part the token of its row is, -1 if it is not.
STEPPO_DEVICE int place_in(const KeptRows& rows, const Part& of, std::int64_t part) {
  const std::int64_t place = rows.places[of.row] - of.number * part;
  return place >= 0 && place < of.count ? static_cast<int>(place) : -1;
}

// Beside what a thread keeps there are not the registers for `fast_soft_cap`.
template <class In>
STEPPO_DEVICE Capped<RowValue<In>> capped(const KeptRows& rows, RowValue<In> logit) {
  if (!(rows.softcap > 0)) return {logit, 1};
  const Cap<RowValue<In>> cap(rows.softcap);
  return soft_cap(logit, cap.cap, cap.inverse);
}

// Blocks of a tile take its parts in turn, and columns from `begin` on. Without `is_attention`
// there are logits alone, which those of the columns before are added to.
template <class In, int threads, int packs, bool is_wide, bool is_attention>
__global__ void __launch_bounds__(threads, kBlocks<threads, is_wide>)
    kept_head_kernel(const KeptProduct head, const KeptRows rows, const Sets sets,
                     const KeptDirections out, unsigned blocks_of_tile, int begin) {
  using Value = RowValue<In>;
  constexpr int kRows = kRowsAtOnce<packs>;
  constexpr Value kLowest = std::numeric_limits<Value>::lowest();
  constexpr Value kLeftOut = -std::numeric_limits<Value>::infinity();
  using SetsOfTile = Tile<threads>;
  STEPPO_SHARED(SetsOfTile, tile);
  const unsigned number = blockIdx.x / blocks_of_tile;
  const auto first_row = static_cast<int>(number * threads);
  const auto parts = static_cast<int>(read_tile(head, sets, out.part, number, tile));
  const In* const weight = static_cast<const In*>(head.weight);
  const In* const bias = static_cast<const In*>(head.bias);
  const ThreadColumns<In, threads, packs, is_wide> columns(begin, static_cast<int>(head.size));
  const int lane = threadIdx.x % kWarp;
  unsigned calls = 0;
#pragma unroll 1
  for (int item = static_cast<int>(blockIdx.x % blocks_of_tile); item < parts;
       item += static_cast<int>(blocks_of_tile)) {
    Part of = part_of(tile, item, first_row, out.part);
    const std::int32_t* const ids = sets.ids + of.first;
    Value* const logits = static_cast<Value*>(head.logits) + of.first;
    // Where in the part the token is, if it is.
    int place = -1;
    double scale = 1;
    if constexpr (is_attention) {
      place = place_in(rows, of, out.part);
      scale = exp_scale<double>(temperature_of(rows, of.row)).scale;
    }
    Running<Value> so_far{kLowest, 0};
    Value own = 0;
    RowOf<In, packs> sum{};
    Pack<In, kPack<In>> state[packs];
    columns.load(static_cast<const In*>(head.hidden) + std::int64_t{of.token} * head.size, state);
    std::int32_t id = 0;
#pragma unroll 1
    for (int at = 0; at < of.count; at += kRows) {
      // The ids of some turns lie in the lanes.
      const int turn = at % kWarp;
      if (turn == 0) id = at + lane < of.count ? ids[at + lane] : 0;
      Pack<In, kPack<In>> kept[kRows][packs] = {};
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const std::int64_t row = __shfl_sync(kAllLanes, id, turn + k);
        if (at + k < of.count) columns.load(weight + row * head.weight_stride, kept[k]);
      }
      Value products[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) products[k] = product_of(kept[k], state);
      Value logit = sum_over_block<threads>(products, calls++);
#pragma unroll
      for (int p = 0; p < packs; ++p) {
        keep_packed(state[p]);
#pragma unroll
        for (int k = 0; k < kRows; ++k) keep_packed(kept[k][p]);
      }
      const std::int32_t own_id = __shfl_sync(kAllLanes, id, (turn + lane) % kWarp);
      const bool has_row = lane < kRows && at + lane < of.count;
      if (has_row && begin == 0 && bias != nullptr) logit += to_number(bias[own_id]);
      if (has_row && threadIdx.x < kWarp) {
        logits[at + lane] = begin == 0 ? logit : logits[at + lane] + logit;
      }
      if constexpr (is_attention) {
        const Capped<Value> z = capped<In>(rows, logit);
        const bool is_other = has_row && at + lane != place;
        if (has_row && !is_other) own = logit;
        const Value left = is_other ? z.value : kLeftOut;
        Value shrinks;
        const Value e = weigh(left, scale, so_far, shrinks);
        if (shrinks != 1) {
#pragma unroll
          for (int p = 0; p < packs; ++p) {
#pragma unroll
            for (int j = 0; j < kPack<In>; ++j) sum.at[p][j] *= shrinks;
          }
        }
        const Value factor = e * z.slope;
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          // What has no part in the softmax is not looked at.
          const Value times = __shfl_sync(kAllLanes, factor, k);
          if (times != 0) add_row(kept[k], times, sum);
        }
      }
    }
    if constexpr (is_attention) {
      const double total = sum_of_lanes<kWarp>(static_cast<double>(so_far.sum));
      // What is known of the part is found once more: meanwhile it would take registers.
      of = part_of(tile, item, first_row, out.part);
      place = place_in(rows, of, out.part);
      Value* to = static_cast<Value*>(out.directions) + std::int64_t{of.row} * head.size;
      Factors factors{0, 1};
      std::int64_t own_row = 0;
      if (of.is_all) {
        // The lane that saw the token.
        const int from = place >= 0 ? place % kRows : 0;
        const Capped<Value> z = capped<In>(rows, __shfl_sync(kAllLanes, own, from));
        factors = factors_of(place >= 0, z.value, so_far.top, total, temperature_of(rows, of.row));
        factors.own *= z.slope;
        if (place >= 0) own_row = sets.ids[of.first + place];
      } else {
        const std::int64_t slot = slot_of(of.first, out.part);
        const std::int64_t at = of.number == 0 ? of.row : head.num_rows + slot;
        if (of.number > 0) to = static_cast<Value*>(out.sums) + slot * head.size;
        if (threadIdx.x == 0) {
          out.tops[at] = so_far.top;
          out.totals[at] = total;
        }
      }
      write_direction(to, columns, weight + own_row * head.weight_stride, factors, sum);
    }
  }
}

// Joins the parts of a long set, in their order. A block takes a row.
template <class In>
__global__ void __launch_bounds__(kThreads, 4)
    join_directions_kernel(const KeptProduct head, const KeptRows rows, const Sets sets,
                           const KeptDirections out) {
  using Value = RowValue<In>;
  const std::int64_t row = blockIdx.x, token = head.rows[row], first = sets.offsets[token];
  const std::int64_t count = sets.offsets[token + 1] - first;
  if (count <= out.part) return;
  const std::int64_t parts = parts_of(count, out.part), place = rows.places[row];
  const double temperature = temperature_of(rows, row);
  const auto slot = [&](std::int64_t part) { return slot_of(first + part * out.part, out.part); };
  const auto entry = [&](std::int64_t part) {
    return part == 0 ? row : head.num_rows + slot(part);
  };
  double top = out.tops[row];
  for (std::int64_t part = 1; part < parts; ++part) {
    const double other = out.tops[entry(part)];
    top = other > top ? other : top;
  }
  const auto shrinks = [&](std::int64_t part) {
    const double d = out.tops[entry(part)] - top;
    return d < 0 ? std::exp(d / temperature) : 1.0;
  };
  double total = 0;
  for (std::int64_t part = 0; part < parts; ++part) {
    total += out.totals[entry(part)] * shrinks(part);
  }
  Capped<Value> own{};
  if (place >= 0) own = capped<In>(rows, static_cast<const Value*>(head.logits)[first + place]);
  Factors factors = factors_of(place >= 0, own.value, top, total, temperature);
  factors.own *= own.slope;
  const In* const own_row = static_cast<const In*>(head.weight) +
                            (place >= 0 ? sets.ids[first + place] : 0) * head.weight_stride;
  Value* const directions = static_cast<Value*>(out.directions) + row * head.size;
  const Value of_own = static_cast<Value>(factors.own);
  for (std::int64_t i = threadIdx.x; i < head.size; i += kThreads) {
    Value sum = directions[i] * static_cast<Value>(factors.others * shrinks(0));
    for (std::int64_t part = 1; part < parts; ++part) {
      const Value other = static_cast<const Value*>(out.sums)[slot(part) * head.size + i];
      sum += other * static_cast<Value>(factors.others * shrinks(part));
    }
    directions[i] = sum + (of_own != 0 ? of_own * to_number(own_row[i]) : Value(0));
  }
}

// Launches blocks of so many threads on columns from `begin` on, and returns where these end.
template <class In, int threads, int packs, bool is_attention>
int launch_at(const Launcher& launch, const KeptProduct& head, const KeptRows& rows,
              const Sets& sets, const KeptDirections& out, int begin) {
  const std::int64_t tiles = ceil_div(head.num_rows, threads);
  // A tile has at most so many parts.
  const std::int64_t most =
      std::min<std::int64_t>(head.num_rows, threads) + sets.num_pairs / out.part;
  const std::int64_t wanted = tiles > 0 ? std::max(ceil_div(kMostBlocks, tiles), kFewest) : 0;
  const auto blocks = static_cast<unsigned>(std::min(most, most_blocks(wanted)));
  const bool is_wide = are_wide<In>(head.hidden, head.size, head.size) &&
                       are_wide<In>(head.weight, head.weight_stride, head.size);
  launch(is_wide ? listed<kept_head_kernel<In, threads, packs, true, is_attention>>()
                 : listed<kept_head_kernel<In, threads, packs, false, is_attention>>(),
         tiles * blocks, threads, head, rows, sets, out, blocks, begin);
  return begin + kColumns<In, threads, packs>;
}

template <class In, bool is_attention>
void launch_head(const Launcher& launch, const KeptProduct& head, const KeptRows& rows,
                 const Sets& sets, const KeptDirections& out) {
  int begin = 0;
  do {
    const auto run =
        head.size - begin <= kColumns<In, 128, 2>   ? &launch_at<In, 128, 2, is_attention>
        : head.size - begin <= kColumns<In, 256, 2> ? &launch_at<In, 256, 2, is_attention>
                                                    : &launch_at<In, 256, 4, is_attention>;
    begin = run(launch, head, rows, sets, out, begin);
  } while (begin < head.size && !is_attention);
}

}  // namespace

void kept_logits(const KeptProduct& head, const Sets& sets, const IdIndex&, const Place& place) {
  const Launcher launch("kept_logits", place);
  KeptDirections none{};
  none.part = kPart;
  with_logits(head.dtype, [&](auto zero) {
    launch_head<decltype(zero), false>(launch, head, KeptRows{}, sets, none);
  });
}

void kept_directions(const KeptProduct& head, const KeptRows& rows, const Sets& sets,
                     const KeptDirections& out, const Place& place) {
  const Launcher launch("kept_directions", place);
  with_logits(head.dtype, [&](auto zero) {
    using In = decltype(zero);
    launch_head<In, true>(launch, head, rows, sets, out);
    // Without more pairs than a part has there is nothing to join.
    launch(listed<join_directions_kernel<In>>(), sets.num_pairs > out.part ? head.num_rows : 0,
           kThreads, head, rows, sets, out);
  });
}

}  // namespace steppo::cuda
