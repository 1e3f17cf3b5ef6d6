#include "small_calls.h"

namespace small_calls {
namespace {

using namespace steppo;

// Which way a call goes.
struct Way {
  std::int64_t vocabulary;
  // One that is out of the range of fp32 is computed in fp64.
  double temperature = 0.7;
  // The gradient: in the place of the logits, in the first half of theirs, or none.
  enum { kNone, kInPlace, kHalved } gradient = kNone;
};

void log_probs(Run& run, const Way& way) {
  constexpr std::int64_t kRows = 3;
  const std::int64_t count = way.vocabulary;
  float* const numbers = run.output(run.numbers(kRows * count));
  const std::vector<std::int64_t> token_ids{count - 1, 0, count / 2};
  const bool mask[kRows] = {true, true, way.gradient == Way::kNone};
  const LogitRows logits{kFloat32, numbers, 0, count, kRows, kRows, count};
  const Targets targets{token_ids.data(), mask, nullptr, way.temperature, 0};
  const LogProbs found{run.output<float>(kRows), run.output<float>(kRows),
                       run.output<double>(kRows), run.output<double>(kRows), nullptr};
  cuda::token_log_probs(logits, targets, found, run.place());
  if (way.gradient == Way::kNone) return;
  const auto grads = run.numbers(kRows), entropy_grads = run.numbers(kRows);
  LogitRows gradient = logits;
  if (way.gradient == Way::kHalved) {
    gradient.dtype = kBFloat16;
    gradient.inner_stride = 2 * count;
  }
  cuda::token_log_probs_backward(gradient, logits, targets,
                                 {found.top, found.log_sum, found.entropy, grads.data(),
                                  entropy_grads.data(), nullptr, nullptr},
                                 run.place());
}

// Backward, more logits than the threads of a block take in one turn; rows that are not halved are
// split.
const Listed forward("token_log_probs", [](Run& run) { log_probs(run, {5001}); });
const Listed in_place("token_log_probs_backward",
                      [](Run& run) { log_probs(run, {5001, 0.7, Way::kInPlace}); });
const Listed halved("token_log_probs_backward_halved",
                    [](Run& run) { log_probs(run, {5001, 0.7, Way::kHalved}); });
const Listed in_fp64("token_log_probs_backward_halved_in_fp64",
                     [](Run& run) { log_probs(run, {600, 1e-20, Way::kHalved}); });
// Too few logits for a pack of 16 bytes.
const Listed few("token_log_probs_backward_halved_of_few",
                 [](Run& run) { log_probs(run, {5, 0.7, Way::kHalved}); });

}  // namespace
}  // namespace small_calls
