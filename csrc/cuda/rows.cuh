// Rows of logits: a block takes one or a part of it, and moves all but its ends 16 bytes at once.
//
// A row begins anywhere and has any length. It is divided at the addresses that are multiples of 16
// bytes: in between lie packs, which threads take in turn, and the numbers at the ends are taken by
// a thread each.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "device.cuh"
#include "launch.h"
#include "masks.cuh"
#include "steppo/arguments.h"
#include "steppo/token_math.h"

namespace steppo::cuda {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / kWarp;
// Blocks that share a processor: as many as there are registers for, which are fewer in fp64.
template <class In>
constexpr int kRowBlocks = sizeof(In) == sizeof(double) ? 2 : 4;

// So many blocks keep every processor busy. Where rows are fewer, each is split into parts, which
// are not so short that their merging would take longer. The card has no say: the last bit of a sum
// must not depend on it.
constexpr std::int64_t kWantedBlocks = 512, kShortestPart = 4096;

// Parts of a row: `size` numbers each, and the last one what is left.
struct RowSplit {
  unsigned parts;
  std::int64_t size;

  // The part that a block of a grid has, and its row.
  STEPPO_MEMBER unsigned row() const { return blockIdx.x / parts; }
  STEPPO_MEMBER std::int64_t begin() const { return blockIdx.x % parts * size; }
  STEPPO_MEMBER std::int64_t length(std::int64_t vocabulary) const {
    return begin() + size < vocabulary ? size : vocabulary - begin();
  }
};

inline RowSplit split_of(std::int64_t num_rows, std::int64_t vocabulary) {
  const std::int64_t wanted = num_rows > 0 ? kWantedBlocks / num_rows : 1;
  const std::int64_t longest =
      std::min<std::int64_t>(ceil_div(vocabulary, kShortestPart), kRowThreads);
  const std::int64_t parts = std::clamp<std::int64_t>(wanted, 1, longest);
  // A row that begins at a multiple of 16 bytes is split at such.
  const std::int64_t size = ceil_div(ceil_div(vocabulary, parts), 16) * 16;
  return {static_cast<unsigned>(ceil_div(vocabulary, size)), size};
}

// What logits of a type are computed in.
template <class In>
using RowValue = std::conditional_t<sizeof(In) == sizeof(double), double, float>;

template <class In>
constexpr int kPack = 16 / static_cast<int>(sizeof(In));

// Loads of 16 bytes that a thread has under way at once. 64 bytes a thread hide how long a load
// takes; fp64 has no registers for them.
template <class In>
constexpr int kLoads = sizeof(In) == sizeof(double) ? 1 : 4;

STEPPO_DEVICE float to_number(float x) { return x; }
STEPPO_DEVICE double to_number(double x) { return x; }

STEPPO_DEVICE double larger(double x, double low) { return x < low ? low : x; }

// What exp_scale makes exponents for.
STEPPO_DEVICE float power(float exponent) { return fast_exp2(exponent); }
STEPPO_DEVICE double power(double exponent) { return std::exp(exponent); }

STEPPO_DEVICE double log_of_power_base(float) { return 0.6931471805599453; }
STEPPO_DEVICE double log_of_power_base(double) { return 1; }

// Rows have a block each, so that their number has 32 bits.
template <class T>
STEPPO_DEVICE T* row_of(const LogitRows& rows, unsigned row) {
  const auto length = static_cast<unsigned>(rows.length);
  return static_cast<T*>(rows.logits) + row / length * rows.outer_stride +
         row % length * rows.inner_stride;
}

STEPPO_DEVICE bool is_masked(const Targets& targets, std::int64_t row) {
  return targets.mask != nullptr && !is_set(targets.mask, row);
}
STEPPO_DEVICE double temperature_of(const Targets& targets, std::int64_t row) {
  return targets.temperatures != nullptr ? targets.temperatures[row] : targets.temperature;
}

STEPPO_DEVICE bool is_word(std::int64_t id, std::int64_t vocabulary) {
  return id >= 0 && id < vocabulary;
}

// The softcap of rows.
template <class Value>
struct Cap {
  Value cap, inverse;
  __device__ __forceinline__ explicit Cap(double softcap)
      : cap(static_cast<Value>(softcap)), inverse(static_cast<Value>(1 / softcap)) {}
};

// cap * tanh(x / cap), and its derivative, by the instructions for powers and reciprocals. The
// value is off by some units of the last place.
STEPPO_DEVICE Capped<float> fast_soft_cap(float x, const Cap<float>& cap) {
  const float u = fabsf(x) * cap.inverse, square = u * u;
  // tanh(u) = u + u square P(square) up to 0.9, to 2e-8.
  const float near_0 =
      u + u * square *
              (-0.333331978f +
               square * (0.133300791f +
                         square * (-0.0537038657f +
                                   square * (0.0208563782f + square * (-0.00680185469f +
                                                                       square * 0.00127776422f)))));
  // Above, what is left to 1 is 2 / (e^2u + 1).
  const float left = 2.0f * fast_reciprocal(1.0f + fast_exp2(u * 2.88539008f));
  const bool is_near_0 = u < 0.9f;
  const float size = is_near_0 ? near_0 : 1.0f - left;
  const float rest = is_near_0 ? 1.0f - near_0 : left;
  return {copysignf(cap.cap * size, x), rest * (2.0f - rest)};
}

// One capped logit, and the derivative of the cap.
template <bool is_capped, class In>
STEPPO_DEVICE Capped<RowValue<In>> capped_logit(In x, const Cap<RowValue<In>>& cap) {
  if constexpr (!is_capped) {
    return {to_number(x), 1};
  } else if constexpr (sizeof(In) == sizeof(double)) {
    return soft_cap(x, cap.cap, cap.inverse);
  } else {
    return fast_soft_cap(to_number(x), cap);
  }
}

// Whether rows of this type of logits can be computed in their own type at a temperature.
template <class In>
STEPPO_DEVICE bool fits(double temperature) {
  return sizeof(In) == sizeof(double) || fits_fp32(temperature);
}

// A row of `length` numbers: `packs` packs of `count`, after `head` numbers that lie before them.
template <int count>
struct Division {
  int head, packs, length;

  // The number that this thread takes of those that lie in no pack, or -1.
  __device__ __forceinline__ int single() const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < head) return thread;
    const int at = packs * count + thread;
    return at < length ? at : -1;
  }
  // The pack of a number, or -1.
  __device__ __forceinline__ int pack_of(std::int64_t at) const {
    const std::int64_t pack = at < head ? -1 : (at - head) / count;
    return pack < packs ? static_cast<int>(pack) : -1;
  }
  // The thread that takes a number; any one for what is no number of the row.
  __device__ __forceinline__ unsigned owner_of(std::int64_t at) const {
    if (at < 0 || at >= length) return 0;
    const int pack = pack_of(at);
    if (pack >= 0) return static_cast<unsigned>(pack) % kRowThreads;
    return static_cast<unsigned>(at < head ? at : at - packs * count);
  }
};

// Numbers side by side in the type of a gradient.
template <class Out, class Value, int count>
STEPPO_DEVICE Pack<Out, count> packed(const Value (&x)[count]) {
  Pack<Out, count> pack;
  if constexpr (sizeof(Out) == 2) {
#pragma unroll
    for (int k = 0; k < count; k += 2) {
      const std::uint32_t both =
          two_numbers(Out{}, static_cast<float>(x[k]), static_cast<float>(x[k + 1]));
      memcpy(&pack.at[k], &both, sizeof both);
    }
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k) pack.at[k] = static_cast<Out>(x[k]);
  }
  return pack;
}
template <class Out, class Value>
STEPPO_DEVICE void store_number(Out* to, Value x) {
  const Value both[2] = {x, x};
  *to = packed<Out>(both).at[0];
}

// The numbers of a pack. A bf16 is the upper half of an fp32, so that words hold two of them.
template <class In, int count>
STEPPO_DEVICE void unpack(const Pack<In, count>& pack, RowValue<In> (&x)[count]) {
#pragma unroll
  for (int k = 0; k < count; ++k) x[k] = to_number(pack.at[k]);
}
template <int count>
STEPPO_DEVICE void unpack(const Pack<BFloat16, count>& pack, float (&x)[count]) {
  if constexpr (count % 2 == 0) {
#pragma unroll
    for (int k = 0; k < count; k += 2) {
      std::uint32_t both;
      memcpy(&both, &pack.at[k], sizeof both);
      const std::uint32_t words[2] = {both << 16, both & 0xFFFF0000u};
      memcpy(&x[k], words, sizeof words);
    }
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k) x[k] = to_number(pack.at[k]);
  }
}

// The same with a softcap.
template <bool is_capped, class In, int count>
STEPPO_DEVICE void unpack_capped(const Pack<In, count>& pack, const Cap<RowValue<In>>& cap,
                                 RowValue<In> (&x)[count]) {
  unpack(pack, x);
#pragma unroll
  for (int k = 0; k < count; ++k) x[k] = capped_logit<is_capped>(x[k], cap).value;
}

// Divides a row where packs of T can be moved.
template <class T>
STEPPO_DEVICE Division<kPack<T>> divided(const T* row, std::int64_t length) {
  const auto beyond = reinterpret_cast<std::uintptr_t>(row) % 16;
  const int before = static_cast<int>((16 - beyond) % 16 / sizeof(T));
  const int head = before < length ? before : static_cast<int>(length);
  return {head, static_cast<int>((length - head) / kPack<T>), static_cast<int>(length)};
}

// Whether all rows at an address, which are so far apart, are made of packs.
template <class T>
bool are_wide(const void* rows, std::int64_t stride, std::int64_t size) {
  return is_wide(rows) && stride % kPack<T> == 0 && size % kPack<T> == 0 && size > 0;
}

// Loads numbers one by one, or 16 bytes at once.
template <int count, bool is_wide, class In>
STEPPO_DEVICE Pack<In, count> load_numbers(const In* from) {
  constexpr int kAtOnce = kPack<In>;
  static_assert(count % kAtOnce == 0, "numbers are loaded 16 bytes at once");
  Pack<In, count> numbers;
  if constexpr (is_wide) {
#pragma unroll
    for (int part = 0; part < count; part += kAtOnce) {
      const auto pack = load_once(reinterpret_cast<const Pack<In, kAtOnce>*>(from + part));
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) numbers.at[part + k] = pack.at[k];
    }
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k) numbers.at[k] = from[k];
  }
  return numbers;
}

// Asks for what a block reads first of a row, a line a thread. While it is under way, the block
// finds out what to do with it.
template <class In>
STEPPO_DEVICE void prefetch_row(const In* row, std::int64_t length) {
  const std::int64_t at = threadIdx.x * (kBytesOfLine / std::int64_t{sizeof(In)});
  if (at < length) prefetch(row + at);
}

// Packs of a row that a thread loads together. In a turn that is whole, all threads of the block
// have all of theirs.
template <class In, int count, int at_once, bool is_whole>
struct Turn {
  static constexpr int kAtOnce = at_once;

  // The first pack of this thread, and those of the row.
  int first, packs;
  Pack<In, count> loaded[at_once];

  STEPPO_MEMBER Turn(int begin, int of_row)
      : first(begin + static_cast<int>(threadIdx.x)), packs(of_row) {}

  STEPPO_MEMBER int at(int k) const { return first + k * kRowThreads; }
  STEPPO_MEMBER bool has(int k) const { return is_whole || at(k) < packs; }

  // `from` is where the first pack of the row begins.
  template <bool is_wide>
  STEPPO_MEMBER void load(const In* from) {
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      if (has(k)) loaded[k] = load_numbers<count, is_wide>(from + std::int64_t{at(k)} * count);
    }
  }
};

// Calls take(turn) for each turn of a row, in their order. All threads of the block come to each.
template <int count, bool is_wide, int at_once, class In, class F>
STEPPO_DEVICE void for_turns(const In* from, int packs, F&& take) {
  constexpr int kOfTurn = at_once * kRowThreads;
  int begin = 0;
  for (; begin <= packs - kOfTurn; begin += kOfTurn) {
    Turn<In, count, at_once, true> turn(begin, packs);
    turn.template load<is_wide>(from);
    take(turn);
  }
  if (begin < packs) {
    Turn<In, count, at_once, false> turn(begin, packs);
    turn.template load<is_wide>(from);
    take(turn);
  }
}

}  // namespace steppo::cuda
