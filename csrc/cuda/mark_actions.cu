// Tokens between markers: see steppo_kernels/layout/segment.py.
#include "launch.h"
#include "steppo/cuda.h"
#include "steppo/markers.h"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// What the tokens of a warp leave behind.
enum Event : int { kNothing, kClosed, kOpened };

struct Events {
  Event at[kWarps];
};

// One launch, a block a row: a token lies in an action if the last event up to it opened one.
// Opening an open action and closing a closed one change nothing, so that events need no order
// among each other but that of their places.
__global__ void __launch_bounds__(kThreads, 4) mark_actions_kernel(Markers markers) {
  STEPPO_SHARED(Events, events);
  const Sequences starts{markers.starts, markers.start_offsets, markers.num_starts};
  const Sequences stops{markers.stops, markers.stop_offsets, markers.num_stops};
  const std::int64_t* const token_ids = markers.token_ids;
  const std::int64_t first = markers.row_offsets[blockIdx.x];
  const std::int64_t last = markers.row_offsets[blockIdx.x + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  bool is_open = false;
  for (std::int64_t tile = first; tile < last; tile += kThreads) {
    const std::int64_t i = tile + threadIdx.x;
    bool opens = false, closes = false;
    if (i < last) {
      closes = longest_at(token_ids, i, last, stops) > 0;
      opens = !closes && starts_behind(token_ids, first, last, i, starts);
      if (i > first && !opens && !closes) {
        closes = contains(markers.ends, markers.num_ends, token_ids[i - 1]);
      }
    }
    const unsigned opening = __ballot_sync(kAllLanes, opens);
    const unsigned changing = __ballot_sync(kAllLanes, opens || closes);
    // A thread may still read the events of the tile before.
    __syncthreads();
    if (lane == 0) {
      // Of two masks without a common bit, the larger one has the last token.
      const bool is_last_opening = opening > (changing & ~opening);
      events.at[warp] = changing == 0 ? kNothing : is_last_opening ? kOpened : kClosed;
    }
    __syncthreads();
    bool is_marked = is_open;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) is_marked = is_open;
      if (events.at[w] != kNothing) is_open = events.at[w] == kOpened;
    }
    const unsigned upto = changing & (kAllLanes >> (kWarp - 1 - lane));
    if (upto != 0) is_marked = opening >> (kWarp - 1 - __clz(static_cast<int>(upto))) & 1;
    if (i < last) markers.mask[i] = is_marked;
  }
}

}  // namespace

void mark_actions(const Markers& args, const Place& place) {
  const Launcher launch("mark_actions", place);
  launch(listed<mark_actions_kernel>(), args.num_rows, kThreads, args);
}

}  // namespace steppo::cuda
