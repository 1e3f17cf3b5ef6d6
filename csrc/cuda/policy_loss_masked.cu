// The policy loss on a mask whose runs of ones are the steps. See losses/policy_loss.py and
// backends/operators.py of the package.
#include "masks.cuh"
#include "policy_call.cuh"

namespace steppo::cuda {
namespace {

// Words of a mask, a bit a token, that a warp loads together.
constexpr int kWords = 6;
// Tokens of a row that a warp looks through. The steps that begin among them are its own, however
// far they reach.
constexpr std::int64_t kChunk = kWords * kWarp;

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
  constexpr int kWarps = kThreads / kWarp;
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
  const std::int64_t row_end = row_begin + masked.row_length;
  int runs = 0;
  unsigned last = 0;
  for (std::int64_t at = row_begin; at < row_end; at += kChunk) {
    const MaskWords words = words_of(masked, at, row_end, lane);
#pragma unroll
    for (int k = 0; k < kWords; ++k) runs += __popc(begins_of(words.at[k], last));
  }
  return runs;
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

// A warp takes chunks of rows: it zeroes the gradients of tokens that are no action's, and adds the
// steps that begin there.
template <class T, int form>
__global__ void __launch_bounds__(kThreads, kBlocksOfCore<T, form>)
    policy_loss_masked_kernel(const PolicyTensors tensors, const Mask masked,
                              const PolicyConfig given, Workspace* workspace,
                              std::int64_t chunks_of_row, std::int64_t chunks, int counted_rows) {
  PolicyArrays<T> call = arrays_of<T>(tensors);
  PolicyConfig config = given;
  if constexpr (form == kPlain) leave_out(call, config);
  const double center = center_of(tensors, config, workspace);
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp;
  CallSums& own = sum_of_thread<kThreads, CallSums>();
  for (std::int64_t chunk = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; chunk < chunks;
       chunk += std::int64_t{gridDim.x} * kWarps) {
    const std::int64_t row_begin = chunk / chunks_of_row * masked.row_length;
    const std::int64_t row_end = row_begin + masked.row_length;
    const std::int64_t begin = row_begin + chunk % chunks_of_row * kChunk;
    const std::int64_t end = begin + kChunk < row_end ? begin + kChunk : row_end;
    const bool counts = config.reduction == kTrajectoryMean;
    const double count = !counts ? 1.0
                         : counted_rows == 0
                             ? runs_of_row(masked, row_begin, lane)
                             : workspace->counters[kFirstRunCounter + chunk / chunks_of_row];
    unsigned last = begin > row_begin && is_set(masked.mask, begin - 1);
    const MaskWords words = words_of(masked, begin, end, lane);
    // Lane k keeps word k: what is asked for by a number that is not known here lies in memory.
    unsigned ones = 0, begins = 0;
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
      if (t >= end || (words.at[k] >> lane & 1u) != 0) continue;
      if (call.grad_log_probs != nullptr) call.grad_log_probs[t] = T(0);
      if (call.grad_entropy != nullptr) call.grad_entropy[t] = T(0);
    }
    for (int word = 0; word < kWords; ++word) {
      unsigned left = __shfl_sync(kAllLanes, begins, word);
      for (; left != 0; left &= left - 1) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        const std::int64_t first = begin + word * kWarp + bit;
        // Zeros from the step's begin on, in the words of the chunk: lane k has those of word k.
        // Behind the row's end there are only zeros.
        unsigned zeros = lane < word || lane >= kWords ? 0u : ~ones;
        if (lane == word) zeros &= ~0u << bit;
        const unsigned in = __ballot_sync(kAllLanes, zeros != 0);
        std::int64_t stop;
        if (in != 0) {
          const int where = __ffs(static_cast<int>(in)) - 1;
          const unsigned bits = __shfl_sync(kAllLanes, zeros, where);
          stop = begin + where * kWarp + __ffs(static_cast<int>(bits)) - 1;
        } else {
          stop = end_of_run(masked, begin + kChunk, row_end, lane);
        }
        const std::int64_t length = stop - first;
        const double weight = step_weight(config.reduction, static_cast<double>(length), count);
        const PolicyRun step{length, first, lane};
        add_step<kWarp, form == kOfTokens>(call, step, config, weight, center, own.sums);
        if (counts && lane == 0) own.trajectories += 1.0 / count;
      }
    }
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
