#include "kept_sets.h"

namespace small_calls {
namespace {

using namespace steppo;

// Sets of several turns of a warp, and gradients where their logits are.
void log_probs(Run& run, double temperature) {
  const KeptSets kept(run, 20, 300, 300);
  const std::int64_t count = kept.num_rows();
  float* const logits = run.output(run.numbers(kept.num_pairs()));
  const KeptRows rows{kFloat32, logits,  kept.places.data(), kept.rows.data(),
                      count,    nullptr, temperature,        0};
  const KeptLogProbs found{run.output<float>(count), run.output<float>(count),
                           run.output<double>(count), run.output<double>(count)};
  cuda::kept_log_probs(rows, kept.sets(), found, run.place());
  const auto grads = run.numbers(count), entropy_grads = run.numbers(count);
  cuda::kept_log_probs_backward(
      rows, kept.sets(),
      {found.top, found.log_sum, found.entropy, grads.data(), entropy_grads.data(), logits},
      run.place());
}

const Listed usual("kept_log_probs", [](Run& run) { log_probs(run, 0.7); });
const Listed in_fp64("kept_log_probs_in_fp64", [](Run& run) { log_probs(run, 1e-20); });

}  // namespace
}  // namespace small_calls
