// What is known of steps once the steps of each row are: every row is a trajectory.
#pragma once

#include "launch.h"

namespace steppo::cuda {

// Outputs that are null are not written.
struct TrajectoryOutputs {
  std::int64_t* trajectory_steps;
  std::int32_t* trajectory_counts;
  std::int64_t* step_rows;
  std::int64_t* state_index;
  std::int32_t* step_lengths;
};

// `token_index` serves `state_index` alone.
void launch_trajectories(const Launcher& launch, const std::int64_t* row_steps,
                         std::int64_t num_rows, const std::int64_t* token_index,
                         const std::int64_t* step_offsets, const TrajectoryOutputs& out);

}  // namespace steppo::cuda
