// Runs operators on a small batch, for the thread sanitizer. The arguments are a seed for the
// order of threads and, if one is to be left out, the place of a barrier or a fence ("file:line").
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "host_grid.h"
#include "steppo/cuda.h"

namespace {

using namespace steppo;

// More steps than a block takes at once, of lengths from 0 to 40, and tokens between them.
constexpr int kSteps = 70;

struct Batch {
  std::mt19937 random{5};
  std::vector<std::int32_t> step_ids, trajectory_counts;
  std::vector<std::int64_t> token_index, step_offsets{0}, step_starts;
  cuda::Workspace workspace{};

  Batch() {
    for (int s = 0; s < kSteps; ++s) {
      step_ids.insert(step_ids.end(), random() % 5, -1);
      const int length = static_cast<int>(random() % 41);
      step_starts.push_back(length > 0 ? static_cast<std::int64_t>(step_ids.size()) : -1);
      for (int i = 0; i < length; ++i) {
        token_index.push_back(static_cast<std::int64_t>(step_ids.size()));
        step_ids.push_back(s);
      }
      step_offsets.push_back(static_cast<std::int64_t>(token_index.size()));
      trajectory_counts.push_back(1 + s % 3);
    }
  }

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(step_ids.size()); }

  std::vector<float> numbers(std::int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> made(static_cast<std::size_t>(count));
    for (float& number : made) number = normal(random) / 8;
    return made;
  }

  Steps steps() const {
    return {step_ids.data(),
            token_index.data(),
            step_offsets.data(),
            step_starts.data(),
            trajectory_counts.data(),
            num_tokens(),
            static_cast<std::int64_t>(token_index.size()),
            kSteps};
  }

  Place place() { return {0, &workspace, 0, nullptr}; }
};

void broadcast(Batch& batch) {
  const auto per_step = batch.numbers(kSteps), per_token = batch.numbers(batch.num_tokens());
  std::vector<float> to_tokens(per_token.size()), to_steps(per_step.size());
  cuda::broadcast_to_tokens(
      {kFloat32, per_step.data(), batch.step_ids.data(), batch.num_tokens(), to_tokens.data()},
      batch.place());
  cuda::sum_over_steps({kFloat32, per_token.data(), batch.token_index.data(),
                        batch.step_offsets.data(), kSteps, to_steps.data()},
                       batch.place());
}

double policy_loss(Batch& batch, Ratio ratio) {
  const std::int64_t count = batch.num_tokens();
  const auto now = batch.numbers(count), old = batch.numbers(count),
             reference = batch.numbers(count);
  const auto entropy = batch.numbers(count), advantages = batch.numbers(kSteps);
  std::vector<float> grad(now.size()), grad_entropy(now.size()), log_ratios(kSteps);
  std::vector<double> metrics(kNumPolicyMetrics);
  float loss = 0;
  PolicyTensors tensors{};
  tensors.dtype = kFloat32;
  tensors.log_probs = now.data();
  tensors.old_log_probs = old.data();
  tensors.advantages = advantages.data();
  tensors.ref_log_probs = reference.data();
  tensors.entropy = entropy.data();
  tensors.loss = &loss;
  tensors.metrics = metrics.data();
  tensors.step_log_ratio = log_ratios.data();
  tensors.grad_log_probs = grad.data();
  tensors.grad_entropy = grad_entropy.data();
  PolicyConfig config{};
  config.ratio = ratio;
  config.clip_low = config.clip_high = 0.2;
  config.token_clip_low = config.token_clip_high = INFINITY;
  config.soft_positive = config.soft_negative = 1;
  config.log_ratio_max = 10;
  config.kl_coef = config.entropy_coef = 0.1;
  cuda::policy_loss(tensors, batch.steps(), config, batch.place());
  const double of_layout = loss;
  std::unique_ptr<bool[]> mask(new bool[now.size()]);
  for (std::size_t i = 0; i < now.size(); ++i) mask[i] = batch.step_ids[i] >= 0;
  tensors.advantages = old.data();
  tensors.advantages_per_token = true;
  tensors.step_log_ratio = nullptr;
  config.reduction = kTrajectoryMean;
  cuda::policy_loss_masked(tensors, {mask.get(), count, count}, config, batch.place());
  return of_layout + loss;
}

// More rows than a block takes at once, the later of which take the places of the earlier.
std::int64_t live_rows(Batch& batch) {
  constexpr std::int64_t kRows = 5000;
  auto grad = batch.numbers(kRows);
  for (std::int64_t i = 0; i < kRows; ++i)
    grad[i] *= static_cast<float>(i > 3 * kRows / 4 || i % 5 == 0);
  std::vector<std::int64_t> order(kRows);
  std::int64_t count = 0, sum = 0;
  for (const bool ascending : {false, true}) {
    cuda::order_live_rows({kFloat32, grad.data(), nullptr, ascending, kRows, order.data(), &count},
                          batch.place());
    for (std::int64_t j = 0; j < count; ++j) sum += j * order[j];
  }
  return sum;
}

}  // namespace

int main(int argc, char** argv) {
  cuda_on_host::options.seed = argc > 1 ? std::stoul(argv[1]) : 0;
  cuda_on_host::options.removed = argc > 2 ? argv[2] : "";
  Batch batch;
  broadcast(batch);
  for (const Ratio ratio : {kGeometric, kCentered, kToken}) {
    std::printf("%.9g\n", policy_loss(batch, ratio));
  }
  std::printf("%lld\n", static_cast<long long>(live_rows(batch)));
  return 0;
}
