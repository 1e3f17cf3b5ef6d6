// Rows of logits: a block takes one or a part of it, and moves all but its ends 16 bytes at once.
//
// A row begins anywhere and has any length. It is divided at the addresses that are multiples of 16
// bytes: in between lie packs, which threads take in turn, and the numbers at the ends are taken by
// a thread each.
#pragma once

#include <algorithm>

#include "masks.cuh"
#include "packs.cuh"
#include "steppo/arguments.h"

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

// Divides a row where packs of T can be moved.
template <class T>
STEPPO_DEVICE Division<kPack<T>> divided(const T* row, std::int64_t length) {
  const auto beyond = reinterpret_cast<std::uintptr_t>(row) % 16;
  const int before = static_cast<int>((16 - beyond) % 16 / sizeof(T));
  const int head = before < length ? before : static_cast<int>(length);
  return {head, static_cast<int>((length - head) / kPack<T>), static_cast<int>(length)};
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
