#include "layout.h"

namespace small_calls {
namespace {

using namespace steppo;

// More steps than the blocks take in one turn.
const Listed value_loss("value_loss", [](Run& run) {
  const Layout layout(run, 1000, 3);
  const std::int64_t num_steps = layout.num_steps(), num_tokens = layout.num_tokens();
  std::vector<std::int64_t> state_index;
  for (std::int64_t s = 0; s < num_steps; ++s) state_index.push_back(s * num_tokens / num_steps);
  const auto values = run.numbers(num_tokens), returns = run.numbers(num_steps),
             old_values = run.numbers(num_steps);
  cuda::value_loss(
      {kFloat32,
       values.data(),
       returns.data(),
       old_values.data(),
       nullptr,
       {},
       true,
       false,
       false,
       num_tokens,
       run.output<float>(1),
       run.output<double>(kNumValueMetrics),
       run.output<double>(1),
       run.output<float>(num_tokens)},
      {state_index.data(), layout.step_lengths.data(), layout.trajectory_counts.data(), num_steps},
      {0.2, kTrajectoryMean}, run.place());
});

}  // namespace
}  // namespace small_calls
