// The policy loss on a mask whose runs of ones are the steps. See losses/policy_loss.py and
// backends/operators.py of the package.
#include <limits>
#include <stdexcept>

#include "masks.cuh"
#include "policy_call.cuh"
#include "scan.cuh"

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

// Counts the runs of rows, a chunk a warp.
__global__ void __launch_bounds__(kThreads, 4)
    count_runs_of_rows_kernel(const Mask masked, Workspace* workspace, std::int64_t chunks_of_row,
                              std::int64_t chunks) {
  const int lane = threadIdx.x % kWarp;
  for (std::int64_t chunk = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; chunk < chunks;
       chunk += std::int64_t{gridDim.x} * kWarps) {
    const std::int64_t row = chunk / chunks_of_row, row_begin = row * masked.row_length;
    const std::int64_t begin = row_begin + chunk % chunks_of_row * kChunk;
    const std::int64_t row_end = row_begin + masked.row_length;
    const MaskWords words = words_of<kWords>(masked, begin, row_end, lane);
    unsigned last = begin > row_begin && is_set(masked.mask, begin - 1);
    int runs = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) runs += __popc(begins_of(words.at[k], last));
    if (lane == 0 && runs > 0) {
      atomicAdd(&workspace->counters[kFirstRunCounter + row], static_cast<unsigned>(runs));
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

// Chunks with steps that a warp finds before the warps of a block share these: so few that the
// shared memory of three blocks fits into the smaller multiprocessors.
constexpr int kPlaces = 2, kPlacesOfBlock = kPlaces * kWarps;
static_assert(kPlacesOfBlock <= kWarp, "a lane knows a place");

// So few steps take a block less time one after the other, if they are long, than its warps beside
// each other.
constexpr int kFewSteps = kWarps / 2;

// A chunk in which steps begin.
struct Chunk {
  // Its first token, and the one at which its last step ends if that is behind it.
  std::int64_t begin, last_end;
  unsigned ones[kWords];
  // Of steps that begin in it, and of those of its row, if that is asked for.
  int num_steps, steps_of_row;
  // Tokens of the chunk where steps begin, in order.
  std::uint8_t steps[kChunk / 2];
};
static_assert(kChunk <= 256, "a byte holds a token");

struct Chunks {
  Chunk at[kPlacesOfBlock];
};

// Zeroes the gradients of tokens of a chunk that are no action's, and fills `chunk` if steps begin
// in it. Returns how many do.
template <class T>
STEPPO_DEVICE int fill(Chunk& chunk, const PolicyArrays<T>& call, const Mask& masked,
                       std::int64_t row_begin, std::int64_t begin, int lane) {
  const std::int64_t row_end = row_begin + masked.row_length;
  unsigned last = begin > row_begin && is_set(masked.mask, begin - 1);
  const auto words = words_of<kWords + kWordsBehind>(masked, begin, row_end, lane);
  int num_steps = 0;
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const unsigned ones = words.at[k], begins = begins_of(ones, last);
    if (lane == k) {
      chunk.ones[k] = ones;
      // Its steps wait less for what is on its way.
      if (ones != 0) prefetch_token(call, begin + k * kWarp);
    }
    if ((begins >> lane & 1u) != 0) {
      const int before = __popc(begins & ((1u << lane) - 1));
      chunk.steps[num_steps + before] = static_cast<std::uint8_t>(k * kWarp + lane);
    }
    num_steps += __popc(begins);
    const std::int64_t t = begin + k * kWarp + lane;
    if (t >= row_end || (ones >> lane & 1u) != 0) continue;
    if (call.grad_log_probs != nullptr) call.grad_log_probs[t] = T(0);
    if (call.grad_entropy != nullptr) call.grad_entropy[t] = T(0);
  }
  if (num_steps == 0) return 0;
  std::int64_t last_end = begin + kChunk;
  if (last != 0) {
    // It mostly ends in the words behind.
    int behind = 0;
#pragma unroll
    for (int k = kWordsBehind - 1; k >= 0; --k) {
      const unsigned zeros = ~words.at[kWords + k];
      behind = zeros == 0 ? behind + kWarp : __ffs(static_cast<int>(zeros)) - 1;
    }
    last_end += behind;
    if (behind == kWordsBehind * kWarp) last_end = end_of_run(masked, last_end, row_end, lane);
  }
  if (lane == 0) {
    chunk.begin = begin;
    chunk.last_end = last_end;
    chunk.num_steps = num_steps;
  }
  return num_steps;
}

// The k-th step of a chunk.
STEPPO_DEVICE PolicyRun step_of(const Chunk& chunk, int k, int lane) {
  const int at = chunk.steps[k];
  // Zeros from the step's begin on: lane k has those of word k. Behind the row's end there are only
  // zeros.
  const unsigned ones = lane < kWords ? chunk.ones[lane] : ~0u;
  unsigned zeros = lane < at / kWarp ? 0u : ~ones;
  if (lane == at / kWarp) zeros &= ~0u << at % kWarp;
  const unsigned in = __ballot_sync(kAllLanes, zeros != 0);
  const std::int64_t first = chunk.begin + at;
  if (in == 0) return {chunk.last_end - first, first, lane};
  const int where = __ffs(static_cast<int>(in)) - 1;
  const unsigned bits = __shfl_sync(kAllLanes, zeros, where);
  return {where * kWarp + __ffs(static_cast<int>(bits)) - 1 - at, first, lane};
}

// Warps look through chunks of rows, and share the steps that they find: some chunks have many, and
// others none.
template <class T, int form>
__global__ void __launch_bounds__(kThreads, kBlocksOfCore<T, form>)
    policy_loss_masked_kernel(const PolicyTensors tensors, const Mask masked,
                              const PolicyConfig given, Workspace* workspace,
                              unsigned chunks_of_row, unsigned num_chunks, int counted_rows) {
  PolicyArrays<T> call = arrays_of<T>(tensors);
  PolicyConfig config = given;
  if constexpr (form == kPlain) leave_out(call, config);
  const double center = center_of(tensors, config, workspace);
  const bool counts = config.reduction == kTrajectoryMean;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  CallSums& own = sum_of_thread<kThreads, CallSums>();
  STEPPO_SHARED(Chunks, chunks);
  unsigned number = blockIdx.x * kWarps + warp;
  do {
    int filled = 0;
    for (; number < num_chunks && filled < kPlaces; number += gridDim.x * kWarps) {
      const unsigned row = number / chunks_of_row;
      const std::int64_t row_begin = row * masked.row_length;
      Chunk& chunk = chunks.at[filled * kWarps + warp];
      const std::int64_t begin = row_begin + (number - row * chunks_of_row) * kChunk;
      if (fill(chunk, call, masked, row_begin, begin, lane) == 0) continue;
      ++filled;
      if (!counts) continue;
      const int count = counted_rows > 0
                            ? static_cast<int>(workspace->counters[kFirstRunCounter + row])
                            : runs_of_row(masked, row_begin, lane);
      if (lane == 0) chunk.steps_of_row = count;
    }
    for (int place = filled; lane == 0 && place < kPlaces; ++place) {
      chunks.at[place * kWarps + warp].num_steps = 0;
    }
    __syncthreads();
    // Lane k knows how many steps lie in the first places up to number k.
    const int of_mine = lane < kPlacesOfBlock ? chunks.at[lane].num_steps : 0;
    const int upto = joined_upto<Sum>(of_mine), all = __shfl_sync(kAllLanes, upto, kWarp - 1);
    // Long steps that are few are shared by all threads, one after the other.
    const bool are_few = all <= kFewSteps;
    for (int s = are_few ? 0 : warp; s < all; s += are_few ? 1 : kWarps) {
      const int where = __ffs(static_cast<int>(__ballot_sync(kAllLanes, upto > s))) - 1;
      const Chunk& chunk = chunks.at[where];
      const int before = __shfl_sync(kAllLanes, upto - of_mine, where);
      PolicyRun step = step_of(chunk, s - before, lane);
      const bool is_shared = are_few && step.length >= kLongStep;
      if (!is_shared && s % kWarps != warp) continue;
      const double count = counts ? chunk.steps_of_row : 1.0;
      const double weight = step_weight(config.reduction, static_cast<double>(step.length), count);
      if (is_shared) {
        step.lane = threadIdx.x;
        add_step<kThreads, form == kOfTokens>(call, step, config, weight, center, own.sums);
      } else {
        add_step<kWarp, form == kOfTokens>(call, step, config, weight, center, own.sums);
      }
      if (counts && step.lane == 0) own.trajectories += 1.0 / count;
    }
    // Places are filled anew when all steps have been added.
  } while (__syncthreads_count(number < num_chunks) > 0);
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
    const std::int64_t chunks_of_row = ceil_div(masked.row_length, kChunk);
    const std::int64_t chunks = rows * chunks_of_row;
    // A division of 64 bits takes long. So many tokens have 400 GB of mask.
    if (chunks > std::numeric_limits<std::int32_t>::max()) {
      throw std::length_error("policy_loss_masked: the mask is too large");
    }
    const int counted_rows = counts_before(config, masked, rows) ? static_cast<int>(rows) : 0;
    if (counted_rows > 0) {
      launch(listed<count_runs_of_rows_kernel>(), step_blocks_for(chunks * kWarp), kThreads, masked,
             workspace, chunks_of_row, chunks);
    }
    const Form form = form_of(tensors, config, false);
    launch(form == kPlain     ? listed<policy_loss_masked_kernel<T, kPlain>>()
           : form == kOfSteps ? listed<policy_loss_masked_kernel<T, kOfSteps>>()
                              : listed<policy_loss_masked_kernel<T, kOfTokens>>(),
           step_blocks_for(chunks * kWarp, form), kThreads, tensors, masked, config, workspace,
           static_cast<unsigned>(chunks_of_row), static_cast<unsigned>(chunks), counted_rows);
  });
}

}  // namespace steppo::cuda
