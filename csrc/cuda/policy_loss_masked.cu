// The policy loss on a mask whose runs of ones are the steps. See losses/policy_loss.py and
// backends/operators.py of the package.
#include "masks.cuh"
#include "policy_call.cuh"
#include "scan.cuh"

namespace steppo::cuda {
namespace {

// Words of a mask, a bit a token, that a warp loads together.
constexpr int kWords = 6;
// Tokens of a row that a warp looks through. The steps that begin among them are its own, however
// far they reach.
constexpr std::int64_t kChunk = kWords * kWarp;

constexpr int kWarps = kThreads / kWarp;

// The tokens of [begin, end) as words. The lanes of a warp load them together, and all get them.
struct MaskWords {
  unsigned at[kWords];
};

STEPPO_DEVICE MaskWords words_of(const Mask& masked, std::int64_t begin, std::int64_t end,
                                 int lane) {
  bool is_one[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const std::int64_t t = begin + k * kWarp + lane;
    is_one[k] = t < end && is_set(masked.mask, t);
  }
  MaskWords words;
#pragma unroll
  for (int k = 0; k < kWords; ++k) words.at[k] = __ballot_sync(kAllLanes, is_one[k]);
  return words;
}

// Where ones begin, if `last` is the bit before the first; becomes that before the next word.
STEPPO_DEVICE unsigned begins_of(unsigned ones, unsigned& last) {
  const unsigned begins = ones & ~(ones << 1 | last);
  last = ones >> (kWarp - 1);
  return begins;
}

// The first token from `at` on where a run of ones ends.
STEPPO_DEVICE std::int64_t end_of_run(const Mask& masked, std::int64_t at, std::int64_t row_end,
                                      int lane) {
  for (; at < row_end; at += kChunk) {
    const MaskWords words = words_of(masked, at, row_end, lane);
    int ones = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      if (ones == k * kWarp)
        ones += words.at[k] == ~0u ? kWarp : __ffs(static_cast<int>(~words.at[k])) - 1;
    }
    if (ones < kChunk) return at + ones;
  }
  return row_end;
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
    const MaskWords words = words_of(masked, begin, row_end, lane);
    unsigned last = begin > row_begin && is_set(masked.mask, begin - 1);
    int runs = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) runs += __popc(begins_of(words.at[k], last));
    if (lane == 0 && runs > 0) {
      atomicAdd(&workspace->counters[kFirstRunCounter + row], static_cast<unsigned>(runs));
    }
  }
}

// The number of runs of a row that was not counted before. Each warp counts for itself: the mask is
// the smallest of the inputs, and a count that all could read would take a launch more.
STEPPO_DEVICE double runs_of_row(const Mask& masked, std::int64_t row_begin, int lane) {
  // Packs that a lane waits for at once, and tokens of a pack a lane.
  constexpr int kPacks = 4;
  constexpr std::int64_t kTokens = kWarp * kMaskBits;
  const std::int64_t row_end = row_begin + masked.row_length;
  int runs = 0;
  unsigned last = 0;
  const auto count = [&](unsigned ones) {
    const unsigned highest = ones >> (kMaskBits - 1);
    unsigned before = __shfl_up_sync(kAllLanes, highest, 1);
    if (lane == 0) before = last;
    runs += __popc(ones & ~(ones << 1 | before));
    last = __shfl_sync(kAllLanes, highest, kWarp - 1);
  };
  const auto off = reinterpret_cast<std::uintptr_t>(masked.mask + row_begin) % kMaskBits;
  for (std::int64_t at = row_begin - static_cast<std::int64_t>(off); at < row_end;) {
    const std::int64_t first = at + lane * kMaskBits;
    if (at >= row_begin && at + kPacks * kTokens <= row_end) {
      unsigned ones[kPacks];
#pragma unroll
      for (int k = 0; k < kPacks; ++k) ones[k] = wide_bits(masked.mask + first + k * kTokens);
#pragma unroll
      for (int k = 0; k < kPacks; ++k) count(ones[k]);
      at += kPacks * kTokens;
    } else {
      count(mask_bits(masked.mask, first, row_begin, row_end, true));
      at += kTokens;
    }
  }
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

// Chunks of a warp, before the warps of a block share the steps that were found in them.
constexpr int kTurns = kWarp / kWarps;

// What the warps of a block leave of their chunks: their bits, and where their steps begin.
struct Chunks {
  struct One {
    unsigned ones[kWords];
    int num_steps;
    std::int64_t begin, row_end;
    // Of steps of its row, if that is asked for.
    double count;
    // Tokens of the chunk, in order.
    std::uint8_t steps[kChunk / 2];
  };
  static_assert(kChunk <= 256, "a byte holds a token");

  One at[kWarp];
};

// Fills the chunk of a warp: finds the steps that begin there, and zeroes the gradients of tokens
// that are no action's.
template <class T>
STEPPO_DEVICE void fill(Chunks::One& chunk, const PolicyArrays<T>& call, const Mask& masked,
                        std::int64_t row, std::int64_t at, int lane) {
  const std::int64_t row_begin = row * masked.row_length;
  const std::int64_t row_end = row_begin + masked.row_length;
  const std::int64_t begin = row_begin + at;
  const std::int64_t end = begin + kChunk < row_end ? begin + kChunk : row_end;
  unsigned last = at > 0 && is_set(masked.mask, begin - 1);
  const MaskWords words = words_of(masked, begin, end, lane);
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
    if (t >= end || (ones >> lane & 1u) != 0) continue;
    if (call.grad_log_probs != nullptr) call.grad_log_probs[t] = T(0);
    if (call.grad_entropy != nullptr) call.grad_entropy[t] = T(0);
  }
  if (lane == 0) {
    chunk.num_steps = num_steps;
    chunk.begin = begin;
    chunk.row_end = row_end;
  }
}

// The k-th step of a chunk.
STEPPO_DEVICE PolicyRun step_of(const Chunks::One& chunk, const Mask& masked, int k, int lane) {
  const int at = chunk.steps[k];
  // Zeros from the step's begin on: lane k has those of word k. Behind the row's end there are only
  // zeros.
  const unsigned ones = lane < kWords ? chunk.ones[lane] : ~0u;
  unsigned zeros = lane < at / kWarp ? 0u : ~ones;
  if (lane == at / kWarp) zeros &= ~0u << at % kWarp;
  const unsigned in = __ballot_sync(kAllLanes, zeros != 0);
  const std::int64_t first = chunk.begin + at;
  if (in == 0) {
    return {end_of_run(masked, chunk.begin + kChunk, chunk.row_end, lane) - first, first, lane};
  }
  const int where = __ffs(static_cast<int>(in)) - 1;
  const unsigned bits = __shfl_sync(kAllLanes, zeros, where);
  return {where * kWarp + __ffs(static_cast<int>(bits)) - 1 - at, first, lane};
}

// Warps fill chunks of rows, and share their steps: some chunks have many, and others none.
template <class T, int form>
__global__ void __launch_bounds__(kThreads, kBlocksOfCore<T, form>)
    policy_loss_masked_kernel(const PolicyTensors tensors, const Mask masked,
                              const PolicyConfig given, Workspace* workspace,
                              std::int64_t chunks_of_row, std::int64_t num_chunks,
                              int counted_rows) {
  PolicyArrays<T> call = arrays_of<T>(tensors);
  PolicyConfig config = given;
  if constexpr (form == kPlain) leave_out(call, config);
  const double center = center_of(tensors, config, workspace);
  const bool counts = config.reduction == kTrajectoryMean;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  CallSums& own = sum_of_thread<kThreads, CallSums>();
  STEPPO_SHARED(Chunks, chunks);
  const std::int64_t stride = std::int64_t{gridDim.x} * kWarps;
  for (std::int64_t first = std::int64_t{blockIdx.x} * kWarps; first < num_chunks;
       first += kTurns * stride) {
    int filled = 0;
    for (; filled < kWarp; filled += kWarps) {
      const std::int64_t of_block = first + filled / kWarps * stride, number = of_block + warp;
      if (of_block >= num_chunks) break;
      Chunks::One& chunk = chunks.at[filled + warp];
      if (number >= num_chunks) {
        if (lane == 0) chunk.num_steps = 0;
        continue;
      }
      const std::int64_t row = number / chunks_of_row;
      fill(chunk, call, masked, row, number % chunks_of_row * kChunk, lane);
      if (!counts) continue;
      const double count = counted_rows > 0 ? workspace->counters[kFirstRunCounter + row]
                                            : runs_of_row(masked, row * masked.row_length, lane);
      if (lane == 0) chunk.count = count;
    }
    __syncthreads();
    // Lane k knows how many steps lie in the first chunks up to number k.
    const int of_mine = lane < filled ? chunks.at[lane].num_steps : 0;
    const int upto = joined_upto<Sum>(of_mine), all = __shfl_sync(kAllLanes, upto, kWarp - 1);
    for (int s = warp; s < all; s += kWarps) {
      const int where = __ffs(static_cast<int>(__ballot_sync(kAllLanes, upto > s))) - 1;
      const Chunks::One& chunk = chunks.at[where];
      const int before = __shfl_sync(kAllLanes, upto - of_mine, where);
      const PolicyRun step = step_of(chunk, masked, s - before, lane);
      const double count = counts ? chunk.count : 1.0;
      const double weight = step_weight(config.reduction, static_cast<double>(step.length), count);
      add_step<kWarp, form == kOfTokens>(call, step, config, weight, center, own.sums);
      if (counts && lane == 0) own.trajectories += 1.0 / count;
    }
    __syncthreads();
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
    const std::int64_t chunks_of_row = ceil_div(masked.row_length, kChunk);
    const std::int64_t chunks = rows * chunks_of_row;
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
           chunks_of_row, chunks, counted_rows);
  });
}

}  // namespace steppo::cuda
