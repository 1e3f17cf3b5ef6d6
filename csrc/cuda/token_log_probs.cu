// Log-probs and entropies of tokens from their logits: see
// steppo_kernels/log_probs/token_log_probs.py. A block takes a row, or one of the parts of it.
#include <limits>

#include "last_block.cuh"
#include "launch.h"
#include "rows.cuh"
#include "softmax.cuh"
#include "steppo/cuda.h"

namespace steppo::cuda {
namespace {

// Adds up what the threads of a block have seen. Thread 0 gets the result.
template <bool need_moment, class Value>
STEPPO_DEVICE RowSums merge(Sums<Value> mine, const ExpScale<Value>& scale) {
  struct Room {
    Value tops[kRowWarps];
    double sums[kRowWarps], moments[kRowWarps];
  };
  STEPPO_SHARED(Room, room);
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Value top = mine.top;
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    const Value other = __shfl_xor_sync(kAllLanes, top, apart);
    top = other > top ? other : top;
  }
  if (lane == 0) room.tops[warp] = top;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kRowWarps; ++k) top = room.tops[k] > top ? room.tops[k] : top;
  move_to<need_moment>(top, scale, mine);
  const double sum = sum_of_lanes<kWarp>(static_cast<double>(mine.sum));
  const double moment = need_moment ? sum_of_lanes<kWarp>(static_cast<double>(mine.moment)) : 0.0;
  if (lane == 0) {
    room.sums[warp] = sum;
    room.moments[warp] = moment;
  }
  __syncthreads();
  RowSums all{top, 0, 0};
  for (int k = 0; k < kRowWarps; ++k) {
    all.sum += room.sums[k];
    all.moment += room.moments[k];
  }
  return all;
}

// Adds what a thread has loaded in a whole turn.
template <bool is_capped, bool need_moment, int count, class In>
STEPPO_DEVICE void add_packs(Pack<In, kPack<In>> (&packs)[count], const Cap<RowValue<In>>& cap,
                             const ExpScale<RowValue<In>>& scale, Sums<RowValue<In>>& sums) {
  if constexpr (is_capped) {
#pragma unroll
    for (int p = 0; p < count; ++p) {
      RowValue<In> x[kPack<In>];
      unpack_capped<is_capped>(packs[p], cap, x);
      add<need_moment>(x, scale, sums);
    }
  } else {
    add<need_moment>(packs, scale, sums);
  }
}

// The sums over a row but its token, whose logit is `target`. Thread 0 gets them. The token may be
// none of the row's, which may be a part of another.
template <bool is_capped, bool need_moment, class In>
STEPPO_DEVICE RowSums sum_row(const In* row, std::int64_t length, std::int64_t id,
                              RowValue<In> target, double temperature,
                              const Cap<RowValue<In>>& cap) {
  using Value = RowValue<In>;
  constexpr int kCount = kPack<In>, kOfTurn = kLoads<In> * kRowThreads;
  constexpr Value kLeftOut = -std::numeric_limits<Value>::infinity();
  const auto parts = divided(row, length);
  const In* const from = row + parts.head;
  const ExpScale<Value> scale = exp_scale<Value>(temperature);
  Sums<Value> sums = first_sums(threadIdx.x == 0, target);
  const int own_pack = parts.pack_of(id);
  const int own = static_cast<int>((id - parts.head) % kCount);
  // Whole turns come first, but for that of the token: nothing is asked of their packs.
  const int whole = parts.packs / kOfTurn * kOfTurn;
  const int own_turn = own_pack < 0 ? whole : own_pack / kOfTurn * kOfTurn;
  for (int begin = 0; begin < whole; begin += kOfTurn) {
    if (begin == own_turn) continue;
    Turn<In, kCount, kLoads<In>, true> turn(begin, parts.packs);
    turn.template load<true>(from);
    add_packs<is_capped, need_moment>(turn.loaded, cap, scale, sums);
  }
#pragma unroll 1
  for (int begin = own_turn; begin < parts.packs; begin = begin < whole ? whole : parts.packs) {
    Turn<In, kCount, kLoads<In>, false> turn(begin, parts.packs);
    turn.template load<true>(from);
#pragma unroll
    for (int k = 0; k < kLoads<In>; ++k) {
      if (!turn.has(k)) continue;
      Value x[kCount];
      unpack_capped<is_capped>(turn.loaded[k], cap, x);
      if (turn.at(k) == own_pack) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) x[j] = j == own ? kLeftOut : x[j];
      }
      add<need_moment>(x, scale, sums);
    }
  }
  if (const int at = parts.single(); at >= 0 && at != id) {
    const Value x[1] = {capped_logit<is_capped>(row[at], cap).value};
    add<need_moment>(x, scale, sums);
  }
  return merge<need_moment>(sums, scale);
}

// The same at a temperature that does not fit.
template <bool is_capped, class In>
STEPPO_DEVICE RowSums sum_fp64_row(const In* row, std::int64_t length, std::int64_t id,
                                   double target, double temperature,
                                   const Cap<RowValue<In>>& cap) {
  const ExpScale<double> scale = exp_scale<double>(temperature);
  Sums<double> sums = first_sums(threadIdx.x == 0, target);
  for (std::int64_t at = threadIdx.x; at < length; at += kRowThreads) {
    const double x[1] = {capped_logit<is_capped>(row[at], cap).value};
    if (at != id) add<true>(x, scale, sums);
  }
  return merge<true>(sums, scale);
}

// Merges what the blocks of a row have seen, in the last of them. Thread 0 gets the result there.
template <bool need_moment>
STEPPO_DEVICE bool merge_parts(const RowSplit& split, double temperature, Workspace* workspace,
                               RowSums& sums) {
  static_assert(kWantedBlocks * sizeof(RowSums) <= sizeof(Workspace::partials));
  static_assert(kWantedBlocks <= Workspace::kCounters);
  RowSums* const left = reinterpret_cast<RowSums*>(workspace->partials);
  if (threadIdx.x == 0) left[blockIdx.x] = sums;
  if (!is_last_block(&workspace->counters[split.row()], split.parts)) return false;
  constexpr double kLowest = std::numeric_limits<double>::lowest();
  Sums<double> mine{kLowest, 0, 0};
  if (threadIdx.x < split.parts) {
    const RowSums& part = left[split.row() * split.parts + threadIdx.x];
    mine = {part.top, part.sum, part.moment};
  }
  sums = merge<need_moment>(mine, exp_scale<double>(temperature));
  return true;
}

template <class In, bool is_capped, bool need_moment>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<In>)
    token_log_probs_kernel(const LogitRows logits, const Targets targets, const LogProbs out,
                           const RowSplit split, Workspace* workspace) {
  using Value = RowValue<In>;
  const unsigned row = split.row();
  RowResult result{};
  if (!is_masked(targets, row)) {
    const double temperature = temperature_of(targets, row);
    const Cap<Value> cap(targets.softcap);
    const In* const x = row_of<In>(logits, row);
    const std::int64_t begin = split.begin(), length = split.length(logits.vocabulary);
    prefetch_row(x + begin, length);
    const std::int64_t id = targets.token_ids[row];
    Value target = std::numeric_limits<Value>::quiet_NaN();
    if (threadIdx.x == 0 && is_word(id, logits.vocabulary))
      target = capped_logit<is_capped>(x[id], cap).value;
    RowSums sums =
        fits<In>(temperature)
            ? sum_row<is_capped, need_moment>(x + begin, length, id - begin, target, temperature,
                                              cap)
            : sum_fp64_row<is_capped>(x + begin, length, id - begin, target, temperature, cap);
    if (split.parts > 1 && !merge_parts<need_moment>(split, temperature, workspace, sums)) return;
    if (threadIdx.x == 0) result = row_result(target, sums, temperature);
  } else if (split.begin() > 0) {
    return;
  }
  if (threadIdx.x != 0) return;
  static_cast<Value*>(out.log_probs)[row] = static_cast<Value>(result.log_prob);
  if (need_moment) static_cast<Value*>(out.entropy)[row] = static_cast<Value>(result.entropy);
  out.top[row] = result.log_sum_exp.top;
  out.log_sum[row] = result.log_sum_exp.log_sum;
}

template <class Out>
STEPPO_DEVICE void write_zeros(Out* row, const Division<kPack<Out>>& parts) {
  auto* const packs = reinterpret_cast<Pack<Out, kPack<Out>>*>(row + parts.head);
  for (int at = static_cast<int>(threadIdx.x); at < parts.packs; at += kRowThreads) {
    store_once(packs + at, Pack<Out, kPack<Out>>{});
  }
  if (const int at = parts.single(); at >= 0) row[at] = Out{};
}

// Writes gradients where, `is_halved`, those of half precision may lie in the first half of the
// logits of their row: then what a thread overwrites, every thread has loaded before.
template <bool is_halved, class In, class Out, class F>
STEPPO_DEVICE void write_row(const In* row, Out* out, const Division<kPack<Out>>& parts,
                             std::int64_t id, float target, F&& slope) {
  constexpr int kCount = kPack<Out>;
  constexpr int kAtOnce = (kLoads<In> * kPack<In> / kCount + 1) / 2;
  const int single = parts.single();
  const In alone = single >= 0 ? row[single] : In{};
  auto* const packs = reinterpret_cast<Pack<Out, kCount>*>(out + parts.head);
  const In* const from = row + parts.head;
  const auto take = [&](auto& turn) {
    if constexpr (is_halved) __syncthreads();
#pragma unroll
    for (int k = 0; k < turn.kAtOnce; ++k) {
      if (!turn.has(k)) continue;
      float slopes[kCount];
      unpack(turn.loaded[k], slopes);
#pragma unroll
      for (int j = 0; j < kCount; ++j) slopes[j] = slope(slopes[j]);
      store_once(packs + turn.at(k), packed<Out>(slopes));
    }
  };
  // Packs of gradients need not be packs of logits.
  if (is_wide(from)) {
    for_turns<kCount, true, kAtOnce>(from, parts.packs, take);
  } else {
    for_turns<kCount, false, 1>(from, parts.packs, take);
  }
  if constexpr (is_halved) __syncthreads();
  if (single >= 0) store_number(out + single, slope(to_number(alone)));
  // The thread that has written there writes anew.
  if (threadIdx.x == parts.owner_of(id) && is_word(id, parts.length)) {
    store_number(out + id, target);
  }
}

// The same number by number, for what is computed in fp64.
template <bool is_halved, class In, class Out, class F>
STEPPO_DEVICE void write_fp64_row(const In* row, Out* out, std::int64_t length, std::int64_t id,
                                  double target, F&& slope) {
  for (std::int64_t begin = 0; begin < length; begin += kRowThreads) {
    const std::int64_t at = begin + threadIdx.x;
    const In x = at < length ? row[at] : In{};
    if constexpr (is_halved) __syncthreads();
    if (at < length) store_number(out + at, at == id ? target : slope(to_number(x)));
  }
}

// What the threads of a block need of their row. One of them works it out, and they read it anew
// where they begin to write: registers hold nothing of it in between.
template <class In, class Out>
struct RowHead {
  RowGradient gradient;
  double temperature, top;
  std::int64_t id;  // as counted from the first number of the block
  const In* logits;
  Out* out;
  Division<kPack<Out>> parts;
};

// The target's logit is read if it is among the `length` from `begin` on, which the block writes
// over.
template <bool is_capped, bool has_rise, class In, class Out>
STEPPO_DEVICE RowHead<In, Out> head_of(const LogitRows& logits, const Targets& targets,
                                       const LogProbGradients& grads, unsigned row,
                                       std::int64_t begin, Out* out,
                                       const Division<kPack<Out>>& parts, double grad,
                                       double grad_entropy) {
  using Value = RowValue<In>;
  constexpr Value kNone = std::numeric_limits<Value>::quiet_NaN();
  const std::int64_t id = targets.token_ids[row];
  const bool is_good = is_word(id, logits.vocabulary);
  Capped<Value> target{kNone, kNone};
  if (is_good && is_word(id - begin, parts.length)) {
    target = capped_logit<is_capped>(row_of<In>(logits, row)[id], Cap<Value>(targets.softcap));
  }
  const double entropy = has_rise ? static_cast<const Value*>(grads.entropy)[row] : Value(0);
  const double top = grads.top[row], temperature = temperature_of(targets, row);
  RowGradient gradient = row_gradient(target.value, {top, grads.log_sum[row]}, entropy,
                                      is_good ? grad : double{kNone}, grad_entropy, temperature);
  gradient.target *= target.slope;
  return {gradient, temperature, top, id - begin, row_of<In>(logits, row) + begin, out, parts};
}

template <class In, class Out, bool is_capped, bool has_rise>
__global__ void __launch_bounds__(kRowThreads, has_rise ? 3 : kRowBlocks<In>)
    token_log_probs_backward_kernel(const LogitRows grad_logits, const LogitRows logits,
                                    const Targets targets, const LogProbGradients grads,
                                    const RowSplit split) {
  using Value = RowValue<In>;
  constexpr bool kIsHalved = sizeof(In) != sizeof(Out);
  using Head = RowHead<In, Out>;
  STEPPO_SHARED(Head, head);
  {
    Out* const out = row_of<Out>(grad_logits, split.row()) + split.begin();
    const auto parts = divided(out, split.length(logits.vocabulary));
    const unsigned row =
        grads.source != nullptr ? static_cast<unsigned>(grads.source[split.row()]) : split.row();
    const double grad = static_cast<const Value*>(grads.grad_log_probs)[row];
    const double grad_entropy =
        has_rise ? static_cast<const Value*>(grads.grad_entropy)[row] : Value(0);
    if (is_masked(targets, row) || (grad == 0 && grad_entropy == 0)) {
      write_zeros(out, parts);
      return;
    }
    const std::int64_t begin = split.begin();
    prefetch_row(row_of<In>(logits, row) + begin, parts.length);
    // The thread that writes over the target is the one that reads it.
    if (threadIdx.x == parts.owner_of(targets.token_ids[row] - begin)) {
      head = head_of<is_capped, has_rise, In>(logits, targets, grads, row, begin, out, parts, grad,
                                              grad_entropy);
    }
  }
  __syncthreads();
  const In* const x = head.logits;
  Out* const out = head.out;
  const auto parts = head.parts;
  const Cap<Value> cap(targets.softcap);
  if constexpr (sizeof(Value) == sizeof(float)) {
    const Slope<is_capped, has_rise, float> slope(head.temperature, head.top, head.gradient);
    if (fits_fp32(head.temperature) && slope.is_finite()) {
      write_row<kIsHalved>(x, out, parts, head.id, static_cast<float>(head.gradient.target),
                           [&](Value logit) { return slope(logit, cap); });
      return;
    }
  }
  const Slope<is_capped, has_rise, double> slope(head.temperature, head.top, head.gradient);
  write_fp64_row<kIsHalved>(x, out, parts.length, head.id, head.gradient.target,
                            [&](Value logit) { return slope(logit, cap); });
}

}  // namespace

void token_log_probs(const LogitRows& logits, const Targets& targets, const LogProbs& out,
                     const Place& place) {
  const Launcher launch("token_log_probs", place);
  with_logits(logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    const bool need_moment = out.entropy != nullptr;
    const auto kernel = targets.softcap > 0
                            ? (need_moment ? listed<token_log_probs_kernel<In, true, true>>()
                                           : listed<token_log_probs_kernel<In, true, false>>())
                            : (need_moment ? listed<token_log_probs_kernel<In, false, true>>()
                                           : listed<token_log_probs_kernel<In, false, false>>());
    const RowSplit split = split_of(logits.num_rows, logits.vocabulary);
    launch(kernel, logits.num_rows * split.parts, kRowThreads, logits, targets, out, split,
           static_cast<Workspace*>(place.workspace));
  });
}

void token_log_probs_backward(const LogitRows& grad_logits, const LogitRows& logits,
                              const Targets& targets, const LogProbGradients& grads,
                              const Place& place) {
  const Launcher launch("token_log_probs_backward", place);
  with_gradient(logits.dtype, grad_logits.dtype, [&](auto zero, auto grad_zero) {
    using In = decltype(zero);
    using Out = decltype(grad_zero);
    const bool has_rise = grads.grad_entropy != nullptr;
    const auto kernel =
        targets.softcap > 0
            ? (has_rise ? listed<token_log_probs_backward_kernel<In, Out, true, true>>()
                        : listed<token_log_probs_backward_kernel<In, Out, true, false>>())
            : (has_rise ? listed<token_log_probs_backward_kernel<In, Out, false, true>>()
                        : listed<token_log_probs_backward_kernel<In, Out, false, false>>());
    // Gradients that lie in the first half of their logits may be written when all of these have
    // been read: by one block.
    const RowSplit split = sizeof(In) != sizeof(Out)
                               ? RowSplit{1, logits.vocabulary}
                               : split_of(grad_logits.num_rows, logits.vocabulary);
    launch(kernel, grad_logits.num_rows * split.parts, kRowThreads, grad_logits, logits, targets,
           grads, split);
  });
}

}  // namespace steppo::cuda
