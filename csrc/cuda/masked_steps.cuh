// The steps of a mask, which are its runs of ones. The warps of a block look through chunks of
// rows, and leave what begins there in shared memory for the block.
#pragma once

#include <algorithm>

#include "masks.cuh"
#include "policy_call.cuh"
#include "scan.cuh"

namespace steppo::cuda {

constexpr int kWarps = kThreads / kWarp;
// Words of a mask, a bit a token, that a warp loads together: those of its tokens, and some behind
// these, in which the last of its steps may end.
constexpr int kWords = 6, kWordsBehind = 2;
// Tokens of a row that a warp looks through together.
constexpr std::int64_t kChunk = kWords * kWarp;

// The tokens of [begin, end) as words. The lanes of a warp load them together, and all get them.
template <int count>
struct MaskWords {
  unsigned at[count];
};

template <int count>
STEPPO_DEVICE MaskWords<count> words_of(const Mask& masked, std::int64_t begin, std::int64_t end,
                                        int lane) {
  bool is_one[count];
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const std::int64_t t = begin + k * kWarp + lane;
    is_one[k] = t < end && is_set(masked.mask, t);
  }
  MaskWords<count> words;
#pragma unroll
  for (int k = 0; k < count; ++k) words.at[k] = __ballot_sync(kAllLanes, is_one[k]);
  return words;
}

// Where ones begin, if `last` is the bit before the first; becomes that before the next word.
STEPPO_DEVICE unsigned begins_of(unsigned ones, unsigned& last) {
  const unsigned begins = ones & ~(ones << 1 | last);
  last = ones >> (kWarp - 1);
  return begins;
}

// Calls use(first, ones) for the tokens [begin, end) of a row, kMaskBits a lane from the lane's
// `first` on, until that returns false; tokens outside are 0. Memory is loaded in packs of 16
// bytes, some at once, wherever `begin` lies.
template <class Use>
STEPPO_DEVICE void for_packs(const Mask& masked, std::int64_t begin, std::int64_t end, int lane,
                             Use&& use) {
  constexpr int kPacks = 4;
  constexpr std::int64_t kTokens = kWarp * kMaskBits;
  const auto off = reinterpret_cast<std::uintptr_t>(masked.mask + begin) % kMaskBits;
  for (std::int64_t at = begin - static_cast<std::int64_t>(off); at < end;) {
    const std::int64_t first = at + lane * kMaskBits;
    if (at >= begin && at + kPacks * kTokens <= end) {
      unsigned ones[kPacks];
#pragma unroll
      for (int k = 0; k < kPacks; ++k) ones[k] = wide_bits(masked.mask + first + k * kTokens);
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (!use(first + k * kTokens, ones[k])) return;
      }
      at += kPacks * kTokens;
    } else {
      if (!use(first, mask_bits(masked.mask, first, begin, end, true))) return;
      at += kTokens;
    }
  }
}

// The first token from `at` on where a run of ones ends.
STEPPO_DEVICE std::int64_t end_of_run(const Mask& masked, std::int64_t at, std::int64_t row_end,
                                      int lane) {
  std::int64_t found = row_end;
  for_packs(masked, at, row_end, lane, [&](std::int64_t first, unsigned ones) {
    // Tokens before `at` are no end of it.
    const unsigned before = first < at ? (1u << (at - first)) - 1 : 0u;
    const unsigned zeros = ~(ones | before) & ((1u << kMaskBits) - 1);
    const unsigned in = __ballot_sync(kAllLanes, zeros != 0);
    if (in == 0) return true;
    const std::int64_t mine = first + __ffs(static_cast<int>(zeros)) - 1;
    found = __shfl_sync(kAllLanes, mine, __ffs(static_cast<int>(in)) - 1);
    return false;
  });
  return found;
}

// A chunk of a row. A row of 2^31 of them would have 400 GB of mask.
struct ChunkPlace {
  std::int64_t row;
  unsigned chunk;
};

// The chunks of all rows, which warps take in turn: a turn is so many rows and chunks of one. A
// warp divides once, and small numbers: a division of 64 bits takes long.
struct Chunks {
  std::int64_t num_rows, turns;
  unsigned of_row;
  ChunkPlace turn;

  STEPPO_MEMBER ChunkPlace first(unsigned number) const {
    const unsigned row = number / of_row;
    return {row, number - row * of_row};
  }

  STEPPO_MEMBER void advance(ChunkPlace& at) const {
    at.row += turn.row;
    at.chunk += turn.chunk;
    if (at.chunk < of_row) return;
    at.chunk -= of_row;
    ++at.row;
  }
};

// The chunks of rows by the warps of so many blocks.
inline Chunks chunks_of(const Mask& masked, std::int64_t rows, std::int64_t blocks) {
  const std::int64_t of_row = std::max<std::int64_t>(ceil_div(masked.row_length, kChunk), 1);
  const std::int64_t turn = blocks * kWarps;
  return {rows,
          ceil_div(rows * of_row, turn),
          static_cast<unsigned>(of_row),
          {turn / of_row, static_cast<unsigned>(turn % of_row)}};
}

// The number of runs of a row that was not counted before. A warp counts for each chunk in which
// steps begin: the mask is the smallest of the inputs.
STEPPO_DEVICE int runs_of_row(const Mask& masked, std::int64_t row_begin, int lane) {
  int runs = 0;
  unsigned last = 0;
  for_packs(masked, row_begin, row_begin + masked.row_length, lane,
            [&](std::int64_t, unsigned ones) {
              const unsigned highest = ones >> (kMaskBits - 1);
              unsigned before = __shfl_up_sync(kAllLanes, highest, 1);
              if (lane == 0) before = last;
              runs += __popc(begins_of(ones, before));
              last = __shfl_sync(kAllLanes, highest, kWarp - 1);
              return true;
            });
  return sum_of_lanes<kWarp>(runs);
}

// Chunks of a warp whose steps a block takes together. Each lane looks at a slot, and a warp at
// all.
constexpr int kTogether = kWarp / kWarps, kSlots = kWarps * kTogether;
static_assert(kSlots == kWarp, "a slot a lane");
// Short steps are taken by groups of lanes, unless a block has a warp for each step: what a step
// takes besides its tokens is done once for all groups of a warp.
constexpr int kGroup = 8;
constexpr int kShortStep = 8 * kGroup;

// A step, and the steps of its row.
struct FoundStep {
  std::int64_t length, start;
  double steps_of_row;
};

// A step that all threads of a block share lies elsewhere, so that lengths are no larger.
struct StepInChunk {
  std::uint16_t first, length;
};
static_assert(kLongStep <= 0xFFFF, "16 bits hold the length of a step that is not shared");

struct StepPlace {
  int slot, number;
};

// What warps have found, a chunk a slot.
struct StepSlots {
  // A chunk's short steps from the front on, the others from the back. There is a zero between two
  // steps.
  static constexpr int kMost = kChunk / 2;
  StepInChunk steps[kSlots][kMost];
  int shorts[kSlots], others[kSlots];
  std::int64_t begins[kSlots];
  double steps_of_row[kSlots];
  // A long step, of which at most one begins in a chunk, or an empty one.
  FoundStep shared[kSlots];

  STEPPO_MEMBER void clear(int slot) {
    shorts[slot] = others[slot] = 0;
    shared[slot] = {0, 0, 1};
  }

  STEPPO_MEMBER FoundStep short_step(const StepPlace& at) const {
    return step_of(at.slot, at.number);
  }
  STEPPO_MEMBER FoundStep other_step(const StepPlace& at) const {
    return step_of(at.slot, kMost - 1 - at.number);
  }

 private:
  STEPPO_MEMBER FoundStep step_of(int slot, int at) const {
    const StepInChunk step = steps[slot][at];
    return {step.length, begins[slot] + step.first, steps_of_row[slot]};
  }
};
static_assert(kLongStep > kChunk, "a second long step would begin behind the chunk");

// Numbers what lies in the slots through all of them.
struct Numbering {
  // Those up to the slot of this lane, and all.
  int upto, count;

  // `in_slot` are those of this lane's.
  STEPPO_MEMBER explicit Numbering(int in_slot)
      : upto(joined_upto<Sum>(in_slot)), count(__shfl_sync(kAllLanes, upto, kWarp - 1)) {}

  // All lanes of a warp call it, with the same number below `count`.
  STEPPO_MEMBER StepPlace place_of(int number) const {
    const int slot = __popc(__ballot_sync(kAllLanes, upto <= number));
    const int before = __shfl_sync(kAllLanes, upto, slot > 0 ? slot - 1 : 0);
    return {slot, number - (slot > 0 ? before : 0)};
  }
};

// Looks through chunks for the steps that begin there, however far they reach, and zeroes the
// gradients of tokens that are no action's.
template <class T>
struct StepFinder {
  const PolicyArrays<T>& call;
  const Mask& masked;
  const Chunks& chunks;
  // The steps of each row; null where a row has to be read for them, or where nobody asks.
  const unsigned* counted;
  bool counts;
  int lane;

  // Puts what begins in a chunk into a slot, which is empty. All lanes of a warp call it.
  STEPPO_MEMBER void fill(StepSlots& slots, int slot, const ChunkPlace& at) const {
    const std::int64_t row_begin = at.row * masked.row_length;
    const std::int64_t row_end = row_begin + masked.row_length;
    const std::int64_t begin = row_begin + at.chunk * kChunk;
    const unsigned before = begin > row_begin && is_set(masked.mask, begin - 1);
    const auto words = words_of<kWords + kWordsBehind>(masked, begin, row_end, lane);
    // Its steps wait less for what is on its way. A lane asks for the first line of what the tokens
    // of a word have.
    unsigned of_lane = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) of_lane = lane == k ? words.at[k] : of_lane;
    if (of_lane != 0) prefetch_token(call, begin + lane * kWarp);
    const std::int64_t end = open_end(words, before, begin, row_end);
    double steps_of_row = 1;
    if (counts && has_begins(words, before)) {
      steps_of_row = counted != nullptr ? counted[at.row] : runs_of_row(masked, row_begin, lane);
    }
    // The chunk's tokens, which are fewer at the row's end.
    const int size = row_end - begin < kChunk ? static_cast<int>(row_end - begin) : kChunk;
    T* const grads = call.grad_log_probs == nullptr ? nullptr : call.grad_log_probs + begin;
    T* const grads_of_entropy = call.grad_entropy == nullptr ? nullptr : call.grad_entropy + begin;
    // From the last word to the first: `stop` is where a run ends that goes on behind a word, as
    // counted from the chunk's begin, and as far as anybody asks.
    constexpr int kFar = kChunk + kLongStep;
    int stop = end < begin + kFar ? static_cast<int>(end - begin) : kFar;
    InSlot found{0, 0};
    const unsigned own = 1u << lane;
#pragma unroll
    for (int k = kWords - 1; k >= 0; --k) {
      const unsigned ones = words.at[k];
      unsigned last = k > 0 ? words.at[k > 0 ? k - 1 : 0] >> (kWarp - 1) : before;
      const unsigned begins = begins_of(ones, last);
      const int first = k * kWarp + lane;
      if (begins != 0) {
        const unsigned zeros = ~ones & ~(own - 1);
        const int stop_of_lane = zeros != 0 ? k * kWarp + __ffs(static_cast<int>(zeros)) - 1 : stop;
        put(slots, slot, begins, {stop_of_lane - first, first}, found);
        if (stop_of_lane - first >= kLongStep && (begins & own) != 0) {
          slots.shared[slot] = {end - begin - first, begin + first, steps_of_row};
        }
      }
      if (ones != ~0u) stop = k * kWarp + __ffs(static_cast<int>(~ones)) - 1;
      if (first >= size || (ones & own) != 0) continue;
      if (grads != nullptr) grads[first] = T(0);
      if (grads_of_entropy != nullptr) grads_of_entropy[first] = T(0);
    }
    if (lane != 0) return;
    slots.shorts[slot] = found.shorts;
    slots.others[slot] = found.others;
    slots.begins[slot] = begin;
    slots.steps_of_row[slot] = steps_of_row;
  }

  // Asks for the mask of a chunk, which is on its way while another one is looked through.
  STEPPO_MEMBER void prefetch_mask(const ChunkPlace& at) const {
    const std::int64_t t = at.row * masked.row_length + at.chunk * kChunk + lane * kBytesOfLine;
    if (lane * kBytesOfLine < kChunk && t < masked.num_tokens) prefetch(masked.mask + t);
  }

 private:
  using Words = MaskWords<kWords + kWordsBehind>;

  // Steps that lie in a slot.
  struct InSlot {
    int shorts, others;
  };
  // That of this lane, if one begins at its token.
  struct StepOfLane {
    int length, first;
  };

  // Adds to a slot what begins in a word of a chunk, but for a long step.
  STEPPO_MEMBER void put(StepSlots& slots, int slot, unsigned begins, const StepOfLane& step,
                         InSlot& in) const {
    const unsigned own = 1u << lane;
    const unsigned is_short = begins & __ballot_sync(kAllLanes, step.length <= kShortStep);
    const unsigned is_other =
        begins & ~is_short & __ballot_sync(kAllLanes, step.length < kLongStep);
    if (((is_short | is_other) & own) != 0) {
      const bool is_mine_short = (is_short & own) != 0;
      const int number = is_mine_short ? in.shorts + __popc(is_short & (own - 1))
                                       : in.others + __popc(is_other & (own - 1));
      slots.steps[slot][is_mine_short ? number : StepSlots::kMost - 1 - number] = {
          static_cast<std::uint16_t>(step.first), static_cast<std::uint16_t>(step.length)};
    }
    in.shorts += __popc(is_short);
    in.others += __popc(is_other);
  }

  STEPPO_MEMBER bool has_begins(const Words& words, unsigned before) const {
    unsigned begins = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) begins |= begins_of(words.at[k], before);
    return begins != 0;
  }

  // The first zero from the end of a chunk on, where a step of the chunk goes on there. It is
  // mostly in the words behind.
  STEPPO_MEMBER std::int64_t open_end(const Words& words, unsigned before, std::int64_t begin,
                                      std::int64_t row_end) const {
    int behind = 0;
#pragma unroll
    for (int k = kWordsBehind - 1; k >= 0; --k) {
      const unsigned zeros = ~words.at[kWords + k];
      behind = zeros == 0 ? behind + kWarp : __ffs(static_cast<int>(zeros)) - 1;
    }
    unsigned all = before != 0 ? ~0u : 0u;
#pragma unroll
    for (int k = 0; k < kWords; ++k) all &= words.at[k];
    const std::int64_t stop = begin + kChunk + behind;
    const bool begins_here = words.at[kWords - 1] >> (kWarp - 1) != 0 && all != ~0u;
    return begins_here && behind == kWordsBehind * kWarp ? end_of_run(masked, stop, row_end, lane)
                                                         : stop;
  }
};

}  // namespace steppo::cuda
