// Runs every operator with 1 and with 4 threads, and from two callers at once; the results must be
// the same bits. Meant for the thread sanitizer, which sees a data race wherever there is one.
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
  Bytes bytes;
  std::vector<int32_t> step_ids(kTokens), lengths;
  std::vector<int64_t> row_steps(kRows + 1), counts(2);
  segment_ids(batch.ids.data(), batch.rows.data(), kTokens, kRows, step_ids.data(),
              row_steps.data(), counts.data(), threads);
  keep(bytes, step_ids);
  segment_rows(batch.flags(), nullptr, kRows, kLength, step_ids.data(), row_steps.data(),
               counts.data(), threads);
  keep(bytes, step_ids);
  segment_mask(batch.flags(), nullptr, batch.rows.data(), kTokens, kRows, step_ids.data(),
               row_steps.data(), counts.data(), threads);
  keep(bytes, step_ids);
  keep(bytes, row_steps);
  const int64_t actions = counts[0], steps = row_steps[kRows];

  std::vector<char> marked(kTokens);
  // Two starts, of which one is the beginning of the other, two ends and a stop.
  const int64_t starts[] = {-1, 1, -1}, start_offsets[] = {0, 2, 3}, ends[] = {7, 9};
  const int64_t stops[] = {3}, stop_offsets[] = {0, 1};
  mark_actions(batch.ids.data(), batch.rows.data(), starts, start_offsets, 2, ends, 2, stops,
               stop_offsets, 1, kRows, reinterpret_cast<bool*>(marked.data()), threads);
  keep(bytes, marked);

  std::vector<int64_t> index(actions), offsets(steps + 1), states(steps), members(steps);
  lengths.resize(steps);
  compact(step_ids.data(), kTokens, steps, actions, index.data(), offsets.data(), lengths.data(),
          threads);
  keep(bytes, index);
  keep(bytes, offsets);
  for (int64_t s = 0; s < steps; ++s) {
    states[s] = index[offsets[s]];
    members[s] = s;
  }

  std::vector<float> advantages(steps), returns(steps), tokens(kTokens), sums(steps);
  step_gae(kFloat32, batch.rewards.data(), batch.log_probs.data(), true, true, step_ids.data(),
           batch.rows.data(), states.data(), members.data(), row_steps.data(), nullptr, 0.99, 0.95,
           true, kTokens, kRows, steps, steps, kRows, advantages.data(), returns.data(), threads);
  keep(bytes, advantages);
  keep(bytes, returns);
  broadcast_to_tokens(kFloat32, advantages.data(), step_ids.data(), kTokens, tokens.data(),
                      threads);
  keep(bytes, tokens);
  sum_over_steps(kFloat32, tokens.data(), index.data(), offsets.data(), steps, sums.data(),
                 threads);
  keep(bytes, sums);

  float loss = 0, scale = 0;
  std::vector<double> metrics(kNumPolicyMetrics);
  std::vector<int32_t> trajectory_counts(steps, 3);
  std::vector<float> grad(kTokens), log_ratios(steps);
  value_loss(kFloat32, batch.log_probs.data(), returns.data(), batch.old_log_probs.data(), true,
             true, states.data(), lengths.data(), trajectory_counts.data(), nullptr, 0.5, kStepMean,
             kTokens, steps, &loss, metrics.data(), grad.data(), &scale, threads);
  keep(bytes, metrics);
  keep(bytes, grad);
  for (const int ratio : {kGeometric, kProduct, kCentered}) {
    policy_loss(kFloat32, batch.log_probs.data(), batch.old_log_probs.data(), advantages.data(),
                batch.ref_log_probs.data(), nullptr, nullptr, nullptr, false, false, index.data(),
                offsets.data(), trajectory_counts.data(), nullptr, nullptr, ratio, 0.2, 0.2, 0,
                10.0, kTrajectoryMean, 0.1, kK3, 0.0, kTokens, steps, &loss, metrics.data(),
                log_ratios.data(), grad.data(), nullptr, &scale, nullptr, threads);
    keep(bytes, metrics);
    keep(bytes, grad);
    keep(bytes, log_ratios);
    policy_loss_masked(kFloat32, batch.log_probs.data(), batch.old_log_probs.data(),
                       batch.advantages.data(), batch.ref_log_probs.data(), nullptr, nullptr,
                       batch.flags(), kLength, nullptr, nullptr, ratio, 0.2, 0.2, 0, 10.0,
                       kTrajectoryMean, 0.1, kK3, 0.0, kTokens, &loss, metrics.data(), grad.data(),
                       nullptr, &scale, threads);
    keep(bytes, metrics);
    keep(bytes, grad);
  }

  // The same numbers as logits.
  constexpr int64_t kVocabulary = 3000, kLogitRows = kTokens / kVocabulary;
  std::vector<int64_t> token_ids(kLogitRows), bad_row(1);
  for (int64_t r = 0; r < kLogitRows; ++r) token_ids[r] = r % kVocabulary;
  std::vector<float> chosen(kLogitRows), entropy(kLogitRows);
  std::vector<double> top(kLogitRows), log_sum(kLogitRows);
  token_log_probs(kFloat32, batch.log_probs.data(), 0, kVocabulary, kLogitRows, kLogitRows,
                  kVocabulary, token_ids.data(), batch.flags(), nullptr, 0.7, 0.0, chosen.data(),
                  entropy.data(), top.data(), log_sum.data(), bad_row.data(), threads);
  token_log_probs_backward(kFloat32, grad.data(), 0, kVocabulary, kFloat32, batch.log_probs.data(),
                           0, kVocabulary, kLogitRows, kVocabulary, token_ids.data(), batch.flags(),
                           nullptr, 0.7, 0.0, top.data(), log_sum.data(), entropy.data(),
                           chosen.data(), chosen.data(), nullptr, kLogitRows, bad_row.data(),
                           threads);
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
