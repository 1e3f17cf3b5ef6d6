#include "layout.h"

namespace small_calls {
namespace {

using namespace steppo;

const Listed to_tokens("broadcast_to_tokens", [](Run& run) {
  const Layout layout(run, 70, 40);
  const auto per_step = run.numbers(layout.num_steps());
  cuda::broadcast_to_tokens({kFloat32, per_step.data(), layout.step_ids.data(), layout.num_tokens(),
                             run.output<float>(layout.num_tokens())},
                            run.place());
});

const Listed over_steps("sum_over_steps", [](Run& run) {
  const Layout layout(run, 20, 40);
  const auto per_token = run.numbers(layout.num_tokens());
  cuda::sum_over_steps(
      {kFloat32, per_token.data(), layout.token_index.data(), layout.step_offsets.data(),
       layout.num_steps(), run.output<float>(layout.num_steps())},
      run.place());
});

}  // namespace
}  // namespace small_calls
