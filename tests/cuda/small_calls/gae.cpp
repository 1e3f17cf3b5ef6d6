#include <algorithm>
#include <numeric>

#include "small_calls.h"

namespace small_calls {
namespace {

using namespace steppo;

using Numbers = std::vector<std::int64_t>;

// Trajectories of so many steps, which lie in any order; every fourth step is in none of them.
struct Trajectories {
  Numbers members, offsets{0}, state_index;

  Trajectories(Run& run, const Numbers& lengths) {
    const std::int64_t total = std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
    for (std::int64_t s = 0; s < total; ++s) members.push_back(s + s / 3);
    for (std::int64_t s = total - 1; s > 0; --s) {
      std::swap(members[static_cast<std::size_t>(s)],
                members[static_cast<std::size_t>(run.draw(s + 1))]);
    }
    for (const std::int64_t length : lengths) offsets.push_back(offsets.back() + length);
    for (std::int64_t s = 0; s < num_steps(); ++s) state_index.push_back(2 * s + run.draw(2));
  }

  std::int64_t num_steps() const {
    return static_cast<std::int64_t>(members.size() + members.size() / 3);
  }
};

// With rewards of steps and values of tokens.
void gae(Run& run, const Numbers& lengths) {
  const Trajectories all(run, lengths);
  const std::int64_t num_steps = all.num_steps();
  const auto rewards = run.numbers(num_steps), values = run.numbers(2 * num_steps),
             bootstrap = run.numbers(static_cast<std::int64_t>(lengths.size()));
  Timeline line{};
  line.state_index = all.state_index.data();
  line.trajectory_steps = all.members.data();
  line.trajectory_offsets = all.offsets.data();
  line.num_steps = num_steps;
  line.num_members = static_cast<std::int64_t>(all.members.size());
  line.num_trajectories = static_cast<std::int64_t>(lengths.size());
  cuda::step_gae({kFloat32, rewards.data(), values.data(), bootstrap.data(), false, true, false,
                  run.output<float>(num_steps), run.output<float>(num_steps)},
                 line, {0.99, 0.95, true}, run.place());
}

// More of them than the warps of all blocks, of up to some tiles of a warp.
const Listed short_ones("gae_of_short_trajectories", [](Run& run) {
  Numbers lengths;
  for (int g = 0; g < 40; ++g) lengths.push_back(run.draw(70));
  gae(run, lengths);
});
// More of them than blocks, of several tiles of a block.
const Listed long_ones("gae_of_long_trajectories",
                       [](Run& run) { gae(run, {4200, 513, 2100, 800}); });
// More steps than the last block whitens by itself.
const Listed many("gae_of_many_steps",
                  [](Run& run) { gae(run, {1100, 1100, 1100, 1100, 1100, 1100, 1100, 1100}); });

// With rewards of tokens. Rows of so many tokens have three steps each, or those of the row before
// where `is_shared`; the steps of the last row are in no trajectory.
void gae_of_rows(Run& run, const Numbers& lengths, const std::vector<bool>& is_shared) {
  Numbers row_offsets{0}, counts, members;
  std::vector<std::int32_t> step_ids;
  for (std::size_t r = 0; r < lengths.size(); ++r) {
    if (!is_shared[r]) counts.insert(counts.end(), 3, 0);
    const auto first = static_cast<std::int32_t>(counts.size()) - 3;
    for (std::int64_t i = 0; i < lengths[r]; ++i) {
      const auto step = first + static_cast<std::int32_t>(3 * i / lengths[r]);
      const bool is_action = run.draw(4) > 0;
      step_ids.push_back(is_action ? step : -1);
      counts[static_cast<std::size_t>(step)] += is_action;
    }
    row_offsets.push_back(row_offsets.back() + lengths[r]);
  }
  Numbers step_offsets{0};
  for (const std::int64_t count : counts) step_offsets.push_back(step_offsets.back() + count);
  const auto num_steps = static_cast<std::int64_t>(counts.size());
  for (std::int64_t s = 0; s < num_steps - 3; ++s) members.push_back(s);
  const Numbers offsets{0, num_steps - 3};
  const auto num_tokens = static_cast<std::int64_t>(step_ids.size());
  const auto rewards = run.numbers(num_tokens), values = run.numbers(num_steps);
  Timeline line{};
  line.step_ids = step_ids.data();
  line.step_offsets = step_offsets.data();
  line.row_offsets = row_offsets.data();
  line.trajectory_steps = members.data();
  line.trajectory_offsets = offsets.data();
  line.num_tokens = num_tokens;
  line.num_rows = static_cast<std::int64_t>(lengths.size());
  line.num_steps = num_steps;
  line.num_members = num_steps - 3;
  line.num_trajectories = 1;
  cuda::step_gae({kFloat32, rewards.data(), values.data(), nullptr, true, false, false,
                  run.output<float>(num_steps), run.output<float>(num_steps)},
                 line, {0.99, 0.95, false}, run.place());
}

// A warp takes a row: of several tiles in the first block, where steps lie in several rows. The
// other warps, and the other blocks, have finished before.
const Listed short_rows("rewards_of_short_rows", [](Run& run) {
  Numbers lengths(17, 90);
  std::vector<bool> is_shared(17, false);
  lengths[0] = 3;
  lengths[4] = 600;
  lengths[5] = 470;
  lengths[6] = 700;
  is_shared[5] = is_shared[6] = true;
  gae_of_rows(run, lengths, is_shared);
});
// A block takes a row of several tiles.
const Listed long_rows("rewards_of_long_rows", [](Run& run) {
  gae_of_rows(run, {2500, 1500, 1200, 2100}, {false, false, true, false});
});

// Where rows of so many tokens are the trajectories, each with a prompt. Steps have one to four
// tokens, which may have tokens of no step between them, as steps have.
void gae_along_rows(Run& run, const Numbers& lengths, bool values_per_token) {
  Numbers row_offsets{0}, offsets{0}, members, state_index;
  std::vector<std::int32_t> step_ids;
  for (const std::int64_t length : lengths) {
    std::int64_t left = 0;
    for (std::int64_t i = 0; i < length; ++i) {
      if (i < length / 8 || run.draw(4) == 0) {
        step_ids.push_back(-1);
        continue;
      }
      if (left == 0) {
        left = 1 + run.draw(4);
        members.push_back(static_cast<std::int64_t>(members.size()));
        state_index.push_back(static_cast<std::int64_t>(step_ids.size()));
      }
      step_ids.push_back(static_cast<std::int32_t>(members.size() - 1));
      --left;
    }
    row_offsets.push_back(static_cast<std::int64_t>(step_ids.size()));
    offsets.push_back(static_cast<std::int64_t>(members.size()));
  }
  const auto num_tokens = static_cast<std::int64_t>(step_ids.size());
  const auto num_rows = static_cast<std::int64_t>(lengths.size());
  const auto num_steps = static_cast<std::int64_t>(members.size());
  const auto rewards = run.numbers(num_tokens),
             values = run.numbers(values_per_token ? num_tokens : num_steps),
             bootstrap = run.numbers(num_rows);
  Timeline line{};
  line.step_ids = step_ids.data();
  line.row_offsets = row_offsets.data();
  line.state_index = state_index.data();
  line.trajectory_steps = members.data();
  line.trajectory_offsets = offsets.data();
  line.num_tokens = num_tokens;
  line.num_rows = line.num_trajectories = num_rows;
  line.num_steps = line.num_members = num_steps;
  cuda::step_gae({kFloat32, rewards.data(), values.data(), bootstrap.data(), true, values_per_token,
                  true, run.output<float>(num_steps), run.output<float>(num_steps)},
                 line, {0.99, 0.95, true}, run.place());
}

// More of them than the warps of all blocks, of up to some tiles of a warp.
const Listed along_short("gae_along_short_rows", [](Run& run) {
  Numbers lengths;
  for (int g = 0; g < 40; ++g) lengths.push_back(run.draw(300));
  gae_along_rows(run, lengths, false);
});
// More of them than blocks, of several tiles of a block.
const Listed along_long("gae_along_long_rows",
                        [](Run& run) { gae_along_rows(run, {9000, 513, 4300, 800}, true); });

}  // namespace
}  // namespace small_calls
