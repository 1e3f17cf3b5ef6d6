// The rows of logits with a gradient: see order_live_rows in steppo_kernels/backends/operators.py.
#include "launch.h"
#include "scan.cuh"
#include "steppo/cuda.h"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 1024;
// Neighbouring rows that a thread takes at once.
constexpr int kRows = 4;

// One block: a chunk has some thousand rows, and more of them cost little beside their logits.
template <class T>
__global__ void __launch_bounds__(kThreads) order_kernel(LiveRows rows) {
  const auto gradient = [&](const void* grad, std::int64_t i) {
    return grad != nullptr && i < rows.num_rows ? static_cast<const T*>(grad)[i] : T(0);
  };
  // A bit for each row of a thread; rows behind the last are dead. NaN is not 0 either.
  const auto live_from = [&](std::int64_t first) {
    T of_log_probs[kRows], of_entropy[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      of_log_probs[k] = gradient(rows.grad_log_probs, first + k);
      of_entropy[k] = gradient(rows.grad_entropy, first + k);
    }
    unsigned live = 0;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const bool is_live = (of_log_probs[k] != T(0)) | (of_entropy[k] != T(0));
      live |= static_cast<unsigned>(is_live) << k;
    }
    return live;
  };
  constexpr int kTile = kThreads * kRows;
  std::int64_t found = 0;
  for (std::int64_t i = threadIdx.x * kRows; i < rows.num_rows; i += kTile) {
    found += __popc(live_from(i));
  }
  const std::int64_t count = join_block<kThreads, Sum>(found, std::int64_t{0});
  if (threadIdx.x == 0) *rows.count = count;

  // The live rows before row `count`.
  STEPPO_SHARED(std::int64_t, kept);
  std::int64_t rank = 0;
  for (std::int64_t tile = 0; tile < rows.num_rows; tile += kTile) {
    const std::int64_t first = tile + threadIdx.x * kRows;
    const unsigned live = live_from(first);
    const Scanned<int> ranks = scan_block<kThreads, Sum>(static_cast<int>(__popc(live)), 0);
    std::int64_t here = rank + ranks.before;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const std::int64_t i = first + k;
      const bool is_live = live >> k & 1;
      if (i == count) kept = here;
      if (!is_live && i < rows.num_rows) rows.order[count + i - here] = i;
      here += is_live;
    }
    // Live rows from row `count` on take the places of dead rows before it, of which there are as
    // many, and which come first among the dead.
    __syncthreads();
    here = rank + ranks.before;
    std::int64_t places[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const std::int64_t i = first + k;
      const bool is_live = live >> k & 1;
      places[k] = rows.ascending ? here : i;
      if (!rows.ascending && is_live && i >= count) places[k] = rows.order[count + here - kept];
      here += is_live;
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (live >> k & 1) rows.order[places[k]] = first + k;
    }
    rank += ranks.all;
  }
}

}  // namespace

void order_live_rows(const LiveRows& rows, const Place& place) {
  const Launcher launch("order_live_rows", place);
  with_dtype(rows.dtype,
             [&](auto zero) { launch(listed<order_kernel<decltype(zero)>>(), 1, kThreads, rows); });
}

}  // namespace steppo::cuda
