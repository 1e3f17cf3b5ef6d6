// Rows as trajectories: see steppo_kernels/layout/segment.py.
#include "steppo/cuda.h"
#include "trajectories.h"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 256;
// The host need not know how many steps there are: threads take what the rows have.
constexpr int kBlocks = 256;

// The row of a step: the first one that ends behind it.
STEPPO_DEVICE std::int64_t row_of(const std::int64_t* row_steps, std::int64_t num_rows,
                                  std::int64_t step) {
  std::int64_t low = 0, high = num_rows - 1;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (row_steps[middle + 1] > step) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kThreads, 4)
    trajectories_kernel(const std::int64_t* row_steps, std::int64_t num_rows,
                        const std::int64_t* token_index, const std::int64_t* step_offsets,
                        TrajectoryOutputs out) {
  const std::int64_t num_steps = row_steps[num_rows];
  for (std::int64_t s = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; s < num_steps;
       s += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t row = row_of(row_steps, num_rows, s);
    out.trajectory_steps[s] = s;
    out.trajectory_counts[s] = static_cast<std::int32_t>(row_steps[row + 1] - row_steps[row]);
    out.step_rows[s] = row;
    const std::int64_t first = step_offsets[s];
    if (out.state_index != nullptr) out.state_index[s] = token_index[first];
    if (out.step_lengths != nullptr) {
      out.step_lengths[s] = static_cast<std::int32_t>(step_offsets[s + 1] - first);
    }
  }
}

}  // namespace

void launch_trajectories(const Launcher& launch, const std::int64_t* row_steps,
                         std::int64_t num_rows, const std::int64_t* token_index,
                         const std::int64_t* step_offsets, const TrajectoryOutputs& out) {
  launch(listed<trajectories_kernel>(), most_blocks(kBlocks), kThreads, row_steps, num_rows,
         token_index, step_offsets, out);
}

void row_trajectories(const RowTrajectories& args, const Place& place) {
  const Launcher launch("row_trajectories", place);
  launch_trajectories(
      launch, args.row_steps, args.num_rows, args.token_index, args.step_offsets,
      {args.trajectory_steps, args.trajectory_counts, args.step_rows, args.state_index, nullptr});
}

}  // namespace steppo::cuda
