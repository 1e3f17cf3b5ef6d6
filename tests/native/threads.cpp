// Runs every operator with 1 and with 4 threads, and from two callers at once; the results must be
// the same bits. Meant for the thread sanitizer, which sees a data race wherever there is one.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "steppo/cpu.h"

namespace {

using namespace steppo;
using namespace steppo::cpu;

constexpr int64_t kRows = 240, kLength = 9000, kTokens = kRows * kLength;

uint32_t state = 1;
double uniform() {
  state = state * 1664525u + 1013904223u;
  return (state >> 8) / 16777216.0;
}

struct Batch {
  std::vector<char> mask = std::vector<char>(kTokens);
  std::vector<int64_t> ids = std::vector<int64_t>(kTokens), rows;
  std::vector<float> log_probs = std::vector<float>(kTokens), old_log_probs = log_probs,
                     ref_log_probs = log_probs, advantages = log_probs, rewards = log_probs;

  Batch() {
    for (int64_t r = 0; r <= kRows; ++r) rows.push_back(r * kLength);
    bool action = false;
    int64_t step = 0;
    for (int64_t i = 0; i < kTokens; ++i) {
      if (uniform() < 0.05) action = !action;
      if (i % kLength == 0) step = 0;
      if (action && i > 0 && !mask[i - 1]) ++step;
      mask[i] = action;
      ids[i] = action ? step : -1;
      log_probs[i] = static_cast<float>(-uniform());
      old_log_probs[i] = static_cast<float>(-uniform());
      ref_log_probs[i] = static_cast<float>(-uniform());
      advantages[i] = static_cast<float>(uniform() - 0.5);
      rewards[i] = uniform() < 0.02 ? 1.0f : 0.0f;
    }
  }
  const bool* flags() const { return reinterpret_cast<const bool*>(mask.data()); }
};

using Bytes = std::vector<char>;

template <class T>
void keep(Bytes& bytes, const std::vector<T>& values) {
  const size_t at = bytes.size();
  bytes.resize(at + values.size() * sizeof(T));
  std::memcpy(bytes.data() + at, values.data(), values.size() * sizeof(T));
}

// All outputs of all operators, one after the other.
Bytes run(const Batch& batch, int threads) {
  const Place place{threads, nullptr, 0, nullptr};
  Bytes bytes;
  std::vector<int32_t> step_ids(kTokens);
  std::vector<int64_t> row_steps(kRows + 1), counts(3);
  const Segments segments{step_ids.data(), row_steps.data(), counts.data()};
  const MaskedRows masked{batch.flags(), nullptr, batch.rows.data(), kTokens, kRows};
  segment_ids({batch.ids.data(), batch.rows.data(), kTokens, kRows}, segments, place);
  keep(bytes, step_ids);
  segment_rows({batch.flags(), nullptr, kRows, kLength}, segments, place);
  keep(bytes, step_ids);
  segment_mask(masked, segments, place);
  keep(bytes, step_ids);
  keep(bytes, row_steps);
  count_steps(masked, {row_steps.data(), counts.data()}, place);
  keep(bytes, row_steps);
  keep(bytes, counts);
  const int64_t actions = counts[0], steps = counts[2];

  std::vector<char> marked(kTokens);
  // Two starts, of which one is the beginning of the other, two ends and a stop.
  const int64_t starts[] = {-1, 1, -1}, start_offsets[] = {0, 2, 3}, ends[] = {7, 9};
  const int64_t stops[] = {3}, stop_offsets[] = {0, 1};
  mark_actions({batch.ids.data(), batch.rows.data(), starts, start_offsets, 2, ends, 2, stops,
                stop_offsets, 1, kRows, reinterpret_cast<bool*>(marked.data())},
               place);
  keep(bytes, marked);

  std::vector<int64_t> index(actions), offsets(steps + 1), begins(steps), states(steps);
  std::vector<int64_t> members(steps), rows(steps);
  std::vector<int32_t> lengths(steps), sizes(steps);
  compact({step_ids.data(), kTokens, steps, actions, index.data(), offsets.data(), lengths.data(),
           begins.data()},
          place);
  row_trajectories({row_steps.data(), index.data(), offsets.data(), kRows, members.data(),
                    sizes.data(), states.data(), rows.data()},
                   place);
  keep(bytes, index);
  keep(bytes, offsets);
  keep(bytes, states);
  lay_out_runs(masked,
               {row_steps.data(), steps, actions, step_ids.data(), index.data(), offsets.data(),
                lengths.data(), begins.data(), members.data(), sizes.data(), rows.data()},
               place);
  keep(bytes, step_ids);
  keep(bytes, index);
  keep(bytes, offsets);
  keep(bytes, begins);

  std::vector<float> advantages(steps), returns(steps), tokens(kTokens), sums(steps);
  const Timeline line{step_ids.data(),
                      offsets.data(),
                      begins.data(),
                      batch.rows.data(),
                      states.data(),
                      members.data(),
                      row_steps.data(),
                      kTokens,
                      kRows,
                      steps,
                      steps,
                      kRows};
  step_gae({kFloat32, batch.rewards.data(), batch.log_probs.data(), nullptr, true, true,
            advantages.data(), returns.data()},
           line, {0.99, 0.95, true}, place);
  keep(bytes, advantages);
  keep(bytes, returns);
  broadcast_to_tokens({kFloat32, advantages.data(), step_ids.data(), kTokens, tokens.data()},
                      place);
  keep(bytes, tokens);
  sum_over_steps({kFloat32, tokens.data(), index.data(), offsets.data(), steps, sums.data()},
                 place);
  keep(bytes, sums);

  float loss = 0;
  std::vector<double> metrics(kNumPolicyMetrics), value_metrics(kNumValueMetrics);
  std::vector<float> grad(kTokens), log_ratios(steps);
  value_loss({kFloat32,
              batch.log_probs.data(),
              returns.data(),
              batch.old_log_probs.data(),
              nullptr,
              {},
              true,
              false,
              true,
              kTokens,
              &loss,
              value_metrics.data(),
              nullptr,
              grad.data()},
             {states.data(), lengths.data(), sizes.data(), steps}, {0.5, kStepMean}, place);
  keep(bytes, value_metrics);
  keep(bytes, grad);
  for (const Ratio ratio : {kGeometric, kProduct, kCentered, kToken}) {
    for (const Surrogate surrogate : {kClip, kCispo, kSoft}) {
      PolicyConfig config{};
      config.ratio = ratio;
      config.surrogate = surrogate;
      config.clip_low = config.clip_high = 0.2;
      config.token_clip_low = config.token_clip_high = ratio == kToken ? HUGE_VAL : 0.5;
      config.soft_positive = config.soft_negative = 1;
      config.log_ratio_max = 10;
      config.reduction = kTrajectoryMean;
      config.kl_coef = 0.1;
      config.kl_estimator = kK3;
      PolicyTensors tensors{};
      tensors.dtype = kFloat32;
      tensors.log_probs = batch.log_probs.data();
      tensors.old_log_probs = batch.old_log_probs.data();
      tensors.advantages = advantages.data();
      tensors.ref_log_probs = batch.ref_log_probs.data();
      tensors.loss = &loss;
      tensors.metrics = metrics.data();
      tensors.step_log_ratio = log_ratios.data();
      tensors.grad_log_probs = grad.data();
      policy_loss(tensors,
                  {step_ids.data(), index.data(), offsets.data(), begins.data(), sizes.data(),
                   kTokens, actions, steps},
                  config, place);
      keep(bytes, metrics);
      keep(bytes, grad);
      keep(bytes, log_ratios);
      tensors.advantages = batch.advantages.data();
      tensors.advantages_per_token = tensors.is_weights_per_token = true;
      policy_loss_masked(tensors, {batch.flags(), kTokens, kLength}, config, place);
      keep(bytes, metrics);
      keep(bytes, grad);
    }
  }

  // The same numbers as logits.
  constexpr int64_t kVocabulary = 3000, kLogitRows = kTokens / kVocabulary;
  std::vector<int64_t> token_ids(kLogitRows), bad_row(1);
  for (int64_t r = 0; r < kLogitRows; ++r) token_ids[r] = r % kVocabulary;
  std::vector<float> chosen(kLogitRows), entropy(kLogitRows);
  std::vector<double> top(kLogitRows), log_sum(kLogitRows);
  const Targets targets{token_ids.data(), batch.flags(), nullptr, 0.7, 0.0};
  const LogitRows logits{kFloat32,   const_cast<float*>(batch.log_probs.data()),
                         0,          kVocabulary,
                         kLogitRows, kLogitRows,
                         kVocabulary};
  LogitRows gradient = logits;
  gradient.logits = grad.data();
  token_log_probs(logits, targets,
                  {chosen.data(), entropy.data(), top.data(), log_sum.data(), bad_row.data()},
                  place);
  token_log_probs_backward(gradient, logits, targets,
                           {top.data(), log_sum.data(), entropy.data(), chosen.data(),
                            chosen.data(), nullptr, bad_row.data()},
                           place);
  keep(bytes, chosen);
  keep(bytes, entropy);
  keep(bytes, grad);
  return bytes;
}

}  // namespace

int main() {
  const Batch batch;
  const Bytes expected = run(batch, 1);
  bool same = run(batch, 4) == expected;
  Bytes other;
  std::thread caller([&] { other = run(batch, 4); });
  same = run(batch, 4) == expected && same;
  caller.join();
  same = other == expected && same;
  std::puts(same ? "threads: the same bits" : "threads: results differ");
  return same ? 0 : 1;
}
