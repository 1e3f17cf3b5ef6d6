// The policy loss on a mask whose runs of ones are the steps. See losses/policy_loss.py and
// backends/operators.py of the package.
#include "masks.cuh"
#include "policy_call.cuh"

namespace steppo::cuda {
namespace {

// Tokens of a row that a warp looks through. The steps that begin among them are its own, however
// far they reach.
constexpr std::int64_t kChunk = 512;

// Where the run of ones that begins at `begin` ends. The lanes of a warp look together.
STEPPO_DEVICE std::int64_t end_of_run(const Mask& masked, std::int64_t begin, std::int64_t row_end,
                                      int lane) {
  for (std::int64_t at = begin;; at += kWarp) {
    const std::int64_t t = at + lane;
    const unsigned ends = __ballot_sync(kAllLanes, t >= row_end || !is_set(masked.mask, t));
    if (ends != 0) return at + __ffs(static_cast<int>(ends)) - 1;
  }
}

// The tokens of [at, at + 32) where runs begin, as bits; `is_one` is of the lane's own token.
STEPPO_DEVICE unsigned begins_of_runs(const Mask& masked, std::int64_t t, std::int64_t row_begin,
                                      std::int64_t end, bool& is_one) {
  is_one = t < end && is_set(masked.mask, t);
  return __ballot_sync(kAllLanes, is_one && (t == row_begin || !is_set(masked.mask, t - 1)));
}

// The number of runs of a row. Each warp counts for itself: the mask is the smallest of the inputs,
// and a count that all could read would take a launch more.
STEPPO_DEVICE double runs_of_row(const Mask& masked, std::int64_t row_begin, int lane) {
  const std::int64_t row_end = row_begin + masked.row_length;
  int runs = 0;
  for (std::int64_t at = row_begin; at < row_end; at += kWarp) {
    bool is_one;
    runs += __popc(begins_of_runs(masked, at + lane, row_begin, row_end, is_one));
  }
  return runs;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    masked_center_kernel(const PolicyTensors tensors, const Mask masked, const PolicyConfig config,
                         Workspace* workspace) {
  const PolicyArrays<T> call = arrays_of<T>(tensors);
  Center& sum = sum_of_thread<kThreads, Center>();
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t t = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; t < masked.num_tokens;
       t += stride) {
    if (is_set(masked.mask, t)) sum.add(call, config, t, t);
  }
  leave_center(workspace);
}

// A warp takes chunks of rows: it zeroes the gradients of tokens that are no action's, and adds the
// steps that begin there.
template <class T, bool by_token>
__global__ void __launch_bounds__(kThreads, 2)
    policy_loss_masked_kernel(const PolicyTensors tensors, const Mask masked,
                              const PolicyConfig config, Workspace* workspace,
                              std::int64_t chunks_of_row, std::int64_t chunks) {
  const PolicyArrays<T> call = arrays_of<T>(tensors);
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
    const double count =
        config.reduction == kTrajectoryMean ? runs_of_row(masked, row_begin, lane) : 1.0;
    for (std::int64_t at = begin; at < end; at += kWarp) {
      const std::int64_t t = at + lane;
      bool is_one;
      unsigned begins = begins_of_runs(masked, t, row_begin, end, is_one);
      if (t < end && !is_one) {
        if (call.grad_log_probs != nullptr) call.grad_log_probs[t] = T(0);
        if (call.grad_entropy != nullptr) call.grad_entropy[t] = T(0);
      }
      for (; begins != 0; begins &= begins - 1) {
        const std::int64_t first = at + __ffs(static_cast<int>(begins)) - 1;
        const std::int64_t length = end_of_run(masked, first, row_end, lane) - first;
        const double weight = step_weight(config.reduction, static_cast<double>(length), count);
        const PolicyStep step{0, length, first, nullptr, lane};
        add_step<kWarp, by_token>(call, step, config, weight, center, own.sums);
        if (lane == 0) own.trajectories += 1.0 / count;
      }
    }
  }
  finish_call<T>(static_cast<int>(gridDim.x), tensors, config, workspace);
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
    launch(config.ratio == kToken ? listed<policy_loss_masked_kernel<T, true>>()
                                  : listed<policy_loss_masked_kernel<T, false>>(),
           step_blocks_for(chunks * kWarp), kThreads, tensors, masked, config, workspace,
           chunks_of_row, chunks);
  });
}

}  // namespace steppo::cuda
