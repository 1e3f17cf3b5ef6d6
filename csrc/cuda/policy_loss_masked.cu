// The policy loss on a mask whose runs of ones are the steps. See losses/policy_loss.py and
// backends/operators.py of the package.
#include <algorithm>
#include <type_traits>

#include "masks.cuh"
#include "policy_call.cuh"

namespace steppo::cuda {
namespace {

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

// From this length on, rows are counted by a launch of its own, if they are so few that each has a
// counter: every warp would read all of its row.
constexpr std::int64_t kLongRow = 16384, kMostLongRows = Workspace::kCounters - kFirstRunCounter;

bool counts_before(const PolicyConfig& config, const Mask& masked, std::int64_t rows) {
  return config.reduction == kTrajectoryMean && masked.row_length >= kLongRow &&
         rows <= kMostLongRows;
}

// A chunk of a row. A row of 2^31 of them would have 400 GB of mask.
struct ChunkPlace {
  std::int64_t row;
  unsigned chunk;
};

// The chunks of all rows, which warps take in turn: a turn is so many rows and chunks of one. A
// warp divides once, and few numbers: a division of 64 bits takes long.
struct Chunks {
  std::int64_t num_rows;
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
Chunks chunks_of(const Mask& masked, std::int64_t rows, std::int64_t blocks) {
  const std::int64_t of_row = std::max<std::int64_t>(ceil_div(masked.row_length, kChunk), 1);
  const std::int64_t turn = blocks * kWarps;
  return {
      rows, static_cast<unsigned>(of_row), {turn / of_row, static_cast<unsigned>(turn % of_row)}};
}

// Counts the runs of rows, a chunk a warp.
__global__ void __launch_bounds__(kThreads, 4)
    count_runs_of_rows_kernel(const Mask masked, Workspace* workspace, const Chunks chunks) {
  const int lane = threadIdx.x % kWarp;
  for (ChunkPlace at = chunks.first(blockIdx.x * kWarps + threadIdx.x / kWarp);
       at.row < chunks.num_rows; chunks.advance(at)) {
    const std::int64_t row_begin = at.row * masked.row_length;
    const std::int64_t row_end = row_begin + masked.row_length;
    const std::int64_t begin = row_begin + at.chunk * kChunk;
    const auto words = words_of<kWords>(masked, begin, row_end, lane);
    unsigned last = begin > row_begin && is_set(masked.mask, begin - 1);
    int runs = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) runs += __popc(begins_of(words.at[k], last));
    if (lane == 0 && runs > 0) {
      atomicAdd(&workspace->counters[kFirstRunCounter + at.row], static_cast<unsigned>(runs));
    }
  }
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

template <class T>
__global__ void __launch_bounds__(kThreads)
    masked_center_kernel(const PolicyTensors tensors, const Mask masked, const PolicyConfig config,
                         Workspace* workspace) {
  const PolicyArrays<T> call = arrays_of<T>(tensors);
  Center sum;
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
#pragma unroll 4
  for (std::int64_t t = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; t < masked.num_tokens;
       t += stride) {
    if (is_set(masked.mask, t)) sum.add(call, config, t, t);
  }
  sum_of_thread<kThreads, Center>() = sum;
  leave_center(workspace);
}

// A step, and the steps of its row.
struct FoundStep {
  std::int64_t length, start;
  double steps_of_row;
};

// The steps that begin in the chunks of a warp, however far they reach. Where it comes to a chunk,
// it zeroes the gradients of tokens that are no action's.
template <class T>
struct StepFinder {
  const PolicyArrays<T>& call;
  const Mask& masked;
  const Chunks& chunks;
  // Of a row; null where a row has to be read for them, or where nobody asks.
  const unsigned* counted;
  bool counts;
  int lane;
  ChunkPlace at;

  // Of the chunk: lane k has the ones of word k, and those that begin steps. What is asked for by a
  // number that is not known here lies in memory otherwise.
  unsigned ones = 0, begins = 0, with_begins = 0;
  std::int64_t begin = 0, row_end = 0;
  // Ones that follow each other from the end of the chunk on, as far as they are loaded.
  int behind = 0;
  double steps_of_row = 1;

  // Finds the next step; false if there is none. All lanes of a warp call it and get it.
  STEPPO_MEMBER bool next(FoundStep& step) {
    while (with_begins == 0) {
      if (at.row >= chunks.num_rows) return false;
      enter();
      chunks.advance(at);
      if (at.row < chunks.num_rows) prefetch_mask();
    }
    const int word = __ffs(static_cast<int>(with_begins)) - 1;
    const unsigned in_word = __shfl_sync(kAllLanes, begins, word);
    const int bit = __ffs(static_cast<int>(in_word)) - 1;
    if (lane == word) begins &= begins - 1;
    if ((in_word & (in_word - 1)) == 0) with_begins &= with_begins - 1;
    const std::int64_t first = begin + word * kWarp + bit;
    // Zeros from the step's begin on, in the words of the chunk: lane k has those of word k. Behind
    // the row's end there are only zeros.
    unsigned zeros = lane < word || lane >= kWords ? 0u : ~ones;
    if (lane == word) zeros &= ~0u << bit;
    const unsigned in = __ballot_sync(kAllLanes, zeros != 0);
    std::int64_t stop = begin + kChunk + behind;
    if (in != 0) {
      const int where = __ffs(static_cast<int>(in)) - 1;
      const unsigned bits = __shfl_sync(kAllLanes, zeros, where);
      stop = begin + where * kWarp + __ffs(static_cast<int>(bits)) - 1;
    } else if (behind == kWordsBehind * kWarp) {
      stop = end_of_run(masked, stop, row_end, lane);
    }
    step = {stop - first, first, steps_of_row};
    return true;
  }

 private:
  STEPPO_MEMBER void enter() {
    const std::int64_t row_begin = at.row * masked.row_length;
    row_end = row_begin + masked.row_length;
    begin = row_begin + at.chunk * kChunk;
    unsigned last = begin > row_begin && is_set(masked.mask, begin - 1);
    const auto words = words_of<kWords + kWordsBehind>(masked, begin, row_end, lane);
    ones = begins = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const unsigned begins_here = begins_of(words.at[k], last);
      if (lane == k) {
        ones = words.at[k];
        begins = begins_here;
        // Its steps wait less for what is on its way.
        if (ones != 0) prefetch_token(call, begin + k * kWarp);
      }
      const std::int64_t t = begin + k * kWarp + lane;
      if (t >= row_end || (words.at[k] >> lane & 1u) != 0) continue;
      if (call.grad_log_probs != nullptr) call.grad_log_probs[t] = T(0);
      if (call.grad_entropy != nullptr) call.grad_entropy[t] = T(0);
    }
    // The end of a step that begins here and ends behind is mostly in the words behind.
    behind = 0;
#pragma unroll
    for (int k = kWordsBehind - 1; k >= 0; --k) {
      const unsigned zeros = ~words.at[kWords + k];
      behind = zeros == 0 ? behind + kWarp : __ffs(static_cast<int>(zeros)) - 1;
    }
    with_begins = __ballot_sync(kAllLanes, begins != 0);
    if (counts && with_begins != 0) {
      steps_of_row = counted != nullptr ? counted[at.row] : runs_of_row(masked, row_begin, lane);
    }
  }

  // Asks for the mask of a chunk, which is on its way while steps of another one are added.
  STEPPO_MEMBER void prefetch_mask() const {
    const std::int64_t t = at.row * masked.row_length + at.chunk * kChunk + lane * kBytesOfLine;
    if (lane * kBytesOfLine < kChunk && t < masked.num_tokens) prefetch(masked.mask + t);
  }
};

// Short steps that groups of lanes of a warp take together: what a step takes besides its tokens is
// done once for all of them.
constexpr int kGroup = 8, kGroups = kWarp / kGroup;
constexpr std::int64_t kShortStep = 16 * kGroup;

struct StepsOfGroups {
  // Groups that have a step, the first ones.
  int count = 0;
  // That of the own group, or an empty one.
  FoundStep own{0, 0, 1};

  STEPPO_MEMBER void put(const FoundStep& step, int lane) {
    if (lane / kGroup == count) own = step;
    ++count;
  }
  STEPPO_MEMBER FoundStep first() const {
    return {__shfl_sync(kAllLanes, own.length, 0), __shfl_sync(kAllLanes, own.start, 0),
            __shfl_sync(kAllLanes, own.steps_of_row, 0)};
  }
};

// Long steps that warps leave to all threads of their block, or empty ones.
struct LongSteps {
  FoundStep of_warp[kWarps];
};

// A warp adds the steps that it finds: short ones together, others one after the other, but for one
// long step. Warps that shared out what they find would wait for each other first.
template <class T, int form>
__global__ void __launch_bounds__(kThreads, kBlocksOfCore<T, form>)
    policy_loss_masked_kernel(const PolicyTensors tensors, const Mask masked,
                              const PolicyConfig given, Workspace* workspace, const Chunks chunks,
                              int counted_rows) {
  PolicyArrays<T> call = arrays_of<T>(tensors);
  PolicyConfig config = given;
  if constexpr (form == kPlain) leave_out(call, config);
  const double center = center_of(tensors, config, workspace);
  const bool counts = config.reduction == kTrajectoryMean;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  CallSums& own = sum_of_thread<kThreads, CallSums>();
  STEPPO_SHARED(LongSteps, long_steps);
  const auto add = [&](auto sharers, const FoundStep& step) {
    constexpr int kSharers = decltype(sharers)::value;
    const PolicyRun run{step.length, step.start, static_cast<int>(threadIdx.x % kSharers)};
    const double weight =
        step_weight(config.reduction, static_cast<double>(step.length), step.steps_of_row);
    add_step<kSharers, form == kOfTokens>(call, run, config, weight, center, own.sums);
    if (counts && run.lane == 0 && run.length > 0) own.trajectories += 1.0 / step.steps_of_row;
  };
  if (lane == 0) long_steps.of_warp[warp].length = 0;
  const unsigned* const counted =
      counted_rows > 0 ? workspace->counters + kFirstRunCounter : nullptr;
  StepFinder<T> steps{
      call, masked, chunks, counted, counts, lane, chunks.first(blockIdx.x * kWarps + warp)};
  StepsOfGroups together;
  bool has_left = false;
  for (bool is_more = true; is_more;) {
    FoundStep step{0, 0, 1};
    is_more = steps.next(step);
    if (is_more && step.length <= kShortStep) {
      together.put(step, lane);
      if (together.count < kGroups) continue;
    } else if (step.length >= kLongStep && !has_left) {
      has_left = true;
      if (lane == 0) long_steps.of_warp[warp] = step;
      continue;
    }
    if (together.count == kGroups || (!is_more && together.count > 1)) {
      add(std::integral_constant<int, kGroup>{}, together.own);
      together = {};
    } else {
      if (!is_more) step = together.first();
      if (step.length > 0) add(std::integral_constant<int, kWarp>{}, step);
    }
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    const FoundStep& step = long_steps.of_warp[w];
    if (step.length > 0) add(std::integral_constant<int, kThreads>{}, step);
  }
  finish_call<T>(tensors, config, workspace, counted_rows);
}

}  // namespace

void policy_loss_masked(const PolicyTensors& tensors, const Mask& masked,
                        const PolicyConfig& config, const Place& place) {
  const Launcher launch("policy_loss_masked", place);
  Workspace* const workspace = static_cast<Workspace*>(place.workspace);
  with_dtype(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (needs_center(tensors, config)) {
      launch(listed<masked_center_kernel<T>>(), step_blocks_for(masked.num_tokens), kThreads,
             tensors, masked, config, workspace);
    }
    const std::int64_t rows = masked.row_length > 0 ? masked.num_tokens / masked.row_length : 0;
    const std::int64_t threads = rows * ceil_div(masked.row_length, kChunk) * kWarp;
    const int counted_rows = counts_before(config, masked, rows) ? static_cast<int>(rows) : 0;
    if (counted_rows > 0) {
      const std::int64_t blocks = step_blocks_for(threads);
      launch(listed<count_runs_of_rows_kernel>(), blocks, kThreads, masked, workspace,
             chunks_of(masked, rows, blocks));
    }
    const Form form = form_of(tensors, config, false);
    const std::int64_t blocks = step_blocks_for(threads, form);
    launch(form == kPlain     ? listed<policy_loss_masked_kernel<T, kPlain>>()
           : form == kOfSteps ? listed<policy_loss_masked_kernel<T, kOfSteps>>()
                              : listed<policy_loss_masked_kernel<T, kOfTokens>>(),
           blocks, kThreads, tensors, masked, config, workspace, chunks_of(masked, rows, blocks),
           counted_rows);
  });
}

}  // namespace steppo::cuda
