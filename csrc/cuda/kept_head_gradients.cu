// Gradients of the head over kept sets: see steppo_kernels/backends/kept_operators.py. A warp takes
// some columns of the gradient of a token or of some ids. No two warps write to one place.
#include "launch.h"
#include "row_terms.cuh"
#include "steppo/cuda.h"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 256;
// Rows of the weight that a warp has under way, and of hidden states.
template <bool is_wide>
constexpr int kWeightRows = is_wide ? 8 : 4;
constexpr int kHiddenRows = 4;
// Blocks that share a processor: as many as there are registers for.
constexpr int kHiddenBlocks = 3;
template <class In, bool is_wide>
constexpr int kWeightBlocks = is_wide && sizeof(In) < sizeof(float) ? 4 : 3;
// Neighbouring parts of an index that a warp takes. Most ids have few tokens, and loads of several
// of these are under way together; a part that is full keeps a warp busy by itself.
constexpr std::int64_t kParts = 4;

// What a warp of a grid takes: the columns of a slice of something.
struct Work {
  std::int64_t number, slice;
};
STEPPO_DEVICE Work work_of_warp(std::int64_t slices) {
  const std::int64_t warp = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  return {warp / slices, warp % slices};
}
std::int64_t blocks_for(std::int64_t count, std::int64_t slices) {
  return ceil_div(count * slices * kWarp, kThreads);
}

template <class In, class Out, bool is_wide>
__global__ void __launch_bounds__(kThreads, kHiddenBlocks)
    kept_hidden_gradient_kernel(const KeptHiddenGradient head, const Sets sets,
                                std::int64_t slices) {
  using Value = RowValue<In>;
  const Work work = work_of_warp(slices);
  // The lanes of a warp leave together: they exchange terms.
  if (work.number >= head.num_rows) return;
  const LaneColumns<In, is_wide> columns(work.slice, head.size);
  const std::int64_t token = head.rows[work.number], end = sets.offsets[token + 1];
  const In* const weight = columns.of(static_cast<const In*>(head.weight));
  const Value* const grad_logits = static_cast<const Value*>(head.grad_logits);
  RowSum<In> sum{};
  for (std::int64_t first = sets.offsets[token]; first < end; first += kWarp) {
    const std::int64_t own = first + threadIdx.x % kWarp;
    const std::int32_t id = own < end ? sets.ids[own] : 0;
    const Value factor = own < end ? grad_logits[own] : Value(0);
    for (unsigned left = __ballot_sync(kAllLanes, factor != 0); left != 0;) {
      const Terms<In, is_wide, kWeightRows<is_wide>> terms(weight, head.weight_stride, id, left,
                                                           columns);
      terms.add(terms.lanes, factor, sum);
      left &= ~terms.lanes;
    }
  }
  columns.store(static_cast<Out*>(head.grad_hidden) + token * head.size, sum.at);
}

// What lies in a lane of a part of an index: where its entries end, as counted from the first part
// of the warp, which row is its id's, and the slot of its sum, -1 if the sum is the gradient.
struct Part {
  std::int32_t end, row, slot;
};
STEPPO_DEVICE Part read_part(const IdIndex& index, bool compact, std::int64_t part,
                             std::int64_t begin) {
  const std::int64_t id = index.part_ids[part];
  return {static_cast<std::int32_t>(index.parts[part + 1] - begin),
          compact ? static_cast<std::int32_t>(id) : index.ids[id],
          static_cast<std::int32_t>(index.part_slots[part])};
}

// Writes what a warp has of the sum of a part.
template <class In, bool is_wide>
STEPPO_DEVICE void write_part(const KeptWeightGradient& head, std::int64_t row, std::int64_t slot,
                              const LaneColumns<In, is_wide>& columns, const RowSum<In>& sum) {
  using Value = RowValue<In>;
  const bool has_first = columns.first == 0;
  if (slot < 0) {
    columns.store(static_cast<In*>(head.grad_weight) + row * head.size, sum.at);
    if (has_first && head.grad_bias != nullptr) {
      static_cast<Value*>(head.grad_bias)[row] = sum.of_factors;
    }
  } else {
    Value* const to = static_cast<Value*>(head.sums) + slot * (head.size + 1);
    columns.store_singly(to, sum.at);
    if (has_first) to[head.size] = sum.of_factors;
  }
}

template <class In, bool is_wide>
__global__ void __launch_bounds__(kThreads, kWeightBlocks<In, is_wide>)
    kept_weight_gradient_kernel(const KeptWeightGradient head, const IdIndex index,
                                std::int64_t slices) {
  using Value = RowValue<In>;
  const Work work = work_of_warp(slices);
  const std::int64_t part = work.number * kParts, left_parts = index.num_parts - part;
  if (left_parts <= 0) return;
  const int lane = threadIdx.x % kWarp;
  const int parts = static_cast<int>(left_parts < kParts ? left_parts : kParts);
  const LaneColumns<In, is_wide> columns(work.slice, head.size);
  const In* const hidden = columns.of(static_cast<const In*>(head.hidden));
  const Value* const grad_logits = static_cast<const Value*>(head.grad_logits);
  const std::int64_t begin = index.parts[part];
  const Part mine = read_part(index, head.compact, part + (lane < parts ? lane : 0), begin);
  const int count = __shfl_sync(kAllLanes, mine.end, parts - 1);
  int number = 0, end = __shfl_sync(kAllLanes, mine.end, 0);
  RowSum<In> sum{};
  for (int first = 0; first < count; first += kWarp) {
    const bool has_own = first + lane < count;
    const std::int64_t own = begin + first + lane;
    const auto token = static_cast<std::int32_t>(has_own ? index.tokens[own] : 0);
    const Value factor = has_own ? grad_logits[index.pairs[own]] : Value(0);
    unsigned left = __ballot_sync(kAllLanes, factor != 0);
    do {
      const Terms<In, is_wide, kHiddenRows> terms(hidden, head.size, token, left, columns);
      left &= ~terms.lanes;
      // Entries before this one have been added when these terms have.
      const int done = first + (left != 0 ? __ffs(static_cast<int>(left)) - 1 : kWarp);
      unsigned loaded = terms.lanes;
      while (number < parts) {
        const unsigned inside = end - first < kWarp ? (1u << (end - first)) - 1 : kAllLanes;
        terms.add(loaded & inside, factor, sum);
        loaded &= ~inside;
        if (end > done) break;
        write_part(head, __shfl_sync(kAllLanes, mine.row, number),
                   __shfl_sync(kAllLanes, mine.slot, number), columns, sum);
        sum = {};
        ++number;
        end = __shfl_sync(kAllLanes, mine.end, number);
      }
    } while (left != 0);
  }
}

// Adds up the sums of the parts of long ids, in their order. A thread takes a column.
template <class In>
__global__ void __launch_bounds__(kThreads)
    join_parts_kernel(const KeptWeightGradient head, const IdIndex index, unsigned blocks) {
  using Value = RowValue<In>;
  const unsigned x = blockIdx.x / blocks;
  const std::int64_t column = std::int64_t{blockIdx.x % blocks} * kThreads + threadIdx.x;
  if (column > head.size) return;
  const std::int64_t stride = head.size + 1, last = index.long_slots[x + 1];
  const Value* const sums = static_cast<const Value*>(head.sums) + column;
  Value sum = 0;
#pragma unroll 8
  for (std::int64_t slot = index.long_slots[x]; slot < last; ++slot) sum += sums[slot * stride];
  const std::int64_t id = index.long_ids[x], row = head.compact ? id : index.ids[id];
  if (column < head.size) {
    store_number(static_cast<In*>(head.grad_weight) + row * head.size + column, sum);
  } else if (head.grad_bias != nullptr) {
    static_cast<Value*>(head.grad_bias)[row] = sum;
  }
}

// Writes the gradient of a row of hidden states from that of its log-prob. A block takes a row.
template <class In, bool is_wide>
__global__ void __launch_bounds__(kThreads, 4) scale_directions_kernel(const KeptScaling args) {
  using Value = RowValue<In>;
  constexpr int kCount = kPack<In>;
  const std::int64_t row = blockIdx.x;
  const Value grad = static_cast<const Value*>(args.grad)[row];
  const Value* const from = static_cast<const Value*>(args.directions) + row * args.size;
  In* const to = static_cast<In*>(args.grad_hidden) + args.rows[row] * args.size;
  for (std::int64_t i = std::int64_t{threadIdx.x} * kCount; i < args.size;
       i += std::int64_t{kThreads} * kCount) {
    Value x[kCount] = {};
    // Without a gradient, it does not matter what the log-prob does.
    if constexpr (is_wide) {
      if (grad != 0) unpack(load_numbers<kCount, true>(from + i), x);
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[k] *= grad;
      store_once(reinterpret_cast<Pack<In, kCount>*>(to + i), packed<In>(x));
    } else {
      for (int k = 0; k < kCount && i + k < args.size; ++k) {
        store_number(to + i + k, grad != 0 ? from[i + k] * grad : Value(0));
      }
    }
  }
}

}  // namespace

void kept_hidden_gradient(const KeptHiddenGradient& head, const Sets& sets, const Place& place) {
  const Launcher launch("kept_hidden_gradient", place);
  with_sum(head.dtype, head.grad_dtype, [&](auto zero, auto grad_zero) {
    using In = decltype(zero);
    using Out = decltype(grad_zero);
    const bool wide =
        are_wide<In>(head.weight, head.weight_stride, head.size) && is_wide(head.grad_hidden);
    const std::int64_t slices = slices_of<In>(head.size);
    launch(wide ? listed<kept_hidden_gradient_kernel<In, Out, true>>()
                : listed<kept_hidden_gradient_kernel<In, Out, false>>(),
           blocks_for(head.num_rows, slices), kThreads, head, sets, slices);
  });
}

void scale_directions(const KeptScaling& args, const Place& place) {
  const Launcher launch("scale_directions", place);
  with_logits(args.dtype, [&](auto zero) {
    using In = decltype(zero);
    const bool wide =
        are_wide<In>(args.grad_hidden, args.size, args.size) && is_wide(args.directions);
    launch(wide ? listed<scale_directions_kernel<In, true>>()
                : listed<scale_directions_kernel<In, false>>(),
           args.num_rows, kThreads, args);
  });
}

void kept_weight_gradient(const KeptWeightGradient& head, const IdIndex& index,
                          const Place& place) {
  const Launcher launch("kept_weight_gradient", place);
  with_logits(head.dtype, [&](auto zero) {
    using In = decltype(zero);
    const bool wide = are_wide<In>(head.hidden, head.size, head.size) && is_wide(head.grad_weight);
    const std::int64_t slices = slices_of<In>(head.size);
    launch(wide ? listed<kept_weight_gradient_kernel<In, true>>()
                : listed<kept_weight_gradient_kernel<In, false>>(),
           blocks_for(ceil_div(index.num_parts, kParts), slices), kThreads, head, index, slices);
    const std::int64_t blocks = ceil_div(head.size + 1, kThreads);
    launch(listed<join_parts_kernel<In>>(), index.num_long * blocks, kThreads, head, index,
           static_cast<unsigned>(blocks));
  });
}

}  // namespace steppo::cuda
