#include <cmath>

#include "layout.h"

namespace small_calls {
namespace {

using namespace steppo;

// What both forms of the loss read and write of `count` tokens.
struct Tensors {
  std::vector<float> now, old, reference, entropy;
  PolicyTensors call{};
  PolicyConfig config{};

  Tensors(Run& run, std::int64_t count, Ratio ratio)
      : now(run.numbers(count)),
        old(run.numbers(count)),
        reference(run.numbers(count)),
        entropy(run.numbers(count)) {
    call.dtype = kFloat32;
    call.log_probs = now.data();
    call.old_log_probs = old.data();
    call.ref_log_probs = reference.data();
    call.entropy = entropy.data();
    call.loss = run.output<float>(1);
    call.metrics = run.output<double>(kNumPolicyMetrics);
    call.gradient_scale = run.output<double>(1);
    call.grad_log_probs = run.output<float>(count);
    call.grad_entropy = run.output<float>(count);
    config.ratio = ratio;
    config.clip_low = config.clip_high = 0.2;
    config.token_clip_low = config.token_clip_high = INFINITY;
    config.soft_positive = config.soft_negative = 1;
    config.log_ratio_max = 10;
    config.kl_coef = config.entropy_coef = 0.1;
  }
};

// More steps than the blocks take in one turn.
void on_layout(Run& run, Ratio ratio, int num_steps, int longest) {
  const Layout layout(run, num_steps, longest);
  Tensors tensors(run, layout.num_tokens(), ratio);
  const auto advantages = run.numbers(layout.num_steps());
  tensors.call.advantages = advantages.data();
  tensors.call.step_log_ratio = run.output<float>(layout.num_steps());
  cuda::policy_loss(tensors.call, layout.steps(), tensors.config, run.place());
}

// Rows that are longer than what a warp looks through, of which a row is one long step, or has
// many.
void on_mask(Run& run, Ratio ratio, std::int64_t rows = 40, std::int64_t length = 530,
             bool is_long = false) {
  const std::int64_t count = rows * length;
  Tensors tensors(run, count, ratio);
  const auto advantages = run.numbers(count);
  tensors.call.advantages = advantages.data();
  tensors.call.advantages_per_token = true;
  tensors.config.reduction = kTrajectoryMean;
  const std::unique_ptr<bool[]> mask(new bool[count]);
  for (std::int64_t i = 0; i < count; ++i) {
    mask[i] = is_long ? i % length != 0 : run.draw(20) < 10 + i / 9 % 10;
  }
  cuda::policy_loss_masked(tensors.call, {mask.get(), count, length}, tensors.config, run.place());
}

// Steps take a block, a warp, some lanes, or one.
const Listed blocks("policy_loss_of_blocks", [](Run& run) { on_layout(run, kGeometric, 5, 4000); });
const Listed geometric("policy_loss_of_long_steps",
                       [](Run& run) { on_layout(run, kGeometric, 70, 40); });
const Listed centered("policy_loss_of_steps", [](Run& run) { on_layout(run, kCentered, 220, 8); });
const Listed token("policy_loss_of_tokens", [](Run& run) { on_layout(run, kToken, 1000, 1); });
const Listed masked("policy_loss_masked", [](Run& run) { on_mask(run, kGeometric); });
const Listed masked_center("policy_loss_masked_centered",
                           [](Run& run) { on_mask(run, kCentered); });
// Rows that a lane reads in some packs at once.
const Listed masked_rows("policy_loss_masked_of_long_rows",
                         [](Run& run) { on_mask(run, kGeometric, 3, 5000); });
const Listed masked_blocks("policy_loss_masked_of_blocks",
                           [](Run& run) { on_mask(run, kGeometric, 7, 3000, true); });
const Listed masked_token("policy_loss_masked_of_tokens", [](Run& run) { on_mask(run, kToken); });

}  // namespace
}  // namespace small_calls
