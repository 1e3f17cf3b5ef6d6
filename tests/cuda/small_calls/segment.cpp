#include <algorithm>

#include "small_calls.h"

namespace small_calls {
namespace {

using namespace steppo;

using Numbers = std::vector<std::int64_t>;

// Rows of a mask: more of them in a tile than a block has threads, and several tiles a block.
struct Masked {
  std::unique_ptr<bool[]> mask, boundaries;
  Numbers offsets{0};

  explicit Masked(Run& run) {
    for (int r = 0; r < 330; ++r) offsets.push_back(offsets.back() + run.draw(r < 300 ? 14 : 1200));
    mask.reset(new bool[offsets.back()]);
    boundaries.reset(new bool[offsets.back()]);
    for (std::int64_t i = 0; i < offsets.back(); ++i) {
      mask[i] = run.draw(20) < 10 + i / 9 % 10;
      boundaries[i] = run.draw(9) == 0;
    }
  }

  std::int64_t num_rows() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
  MaskedRows rows() const {
    return {mask.get(), boundaries.get(), offsets.data(), offsets.back(), num_rows()};
  }
};

const Listed of_mask("segment_mask", [](Run& run) {
  const Masked masked(run);
  cuda::segment_mask(masked.rows(),
                     {run.output<std::int32_t>(masked.offsets.back()),
                      run.output<std::int64_t>(masked.num_rows() + 1), run.output<std::int64_t>(3)},
                     run.place());
});

const Listed laid_out("lay_out_runs", [](Run& run) {
  const Masked masked(run);
  auto* const row_steps = run.output<std::int64_t>(masked.num_rows() + 1);
  auto* const counts = run.output<std::int64_t>(3);
  cuda::count_steps(masked.rows(), {row_steps, counts}, run.place());
  const std::int64_t num_actions = counts[0], num_steps = counts[2];
  cuda::lay_out_runs(
      masked.rows(),
      {row_steps, num_steps, num_actions, run.output<std::int32_t>(masked.offsets.back()),
       run.output<std::int64_t>(num_actions), run.output<std::int64_t>(num_steps + 1),
       run.output<std::int32_t>(num_steps), run.output<std::int64_t>(num_steps),
       run.output<std::int64_t>(num_steps), run.output<std::int32_t>(num_steps),
       run.output<std::int64_t>(num_steps)},
      run.place());
});

// Several tiles a row, and more rows than blocks.
const Listed of_ids("segment_ids", [](Run& run) {
  const Numbers offsets{0, 2600, 2600, 3700, 4000, 6200};
  Numbers ids;
  std::int64_t id = 0;
  for (std::int64_t i = 0; i < offsets.back(); ++i) {
    id += run.draw(12) == 0 ? run.draw(3) : 0;
    ids.push_back(run.draw(4) == 0 ? -1 : id);
  }
  ids[2000] = 0;
  const std::int64_t num_rows = static_cast<std::int64_t>(offsets.size()) - 1;
  cuda::segment_ids({ids.data(), offsets.data(), offsets.back(), num_rows},
                    {run.output<std::int32_t>(offsets.back()),
                     run.output<std::int64_t>(num_rows + 1), run.output<std::int64_t>(3)},
                    run.place());
});

// Several tiles a block.
const Listed of_rows("segment_rows", [](Run& run) {
  constexpr std::int64_t kRows = 7, kLength = 701;
  const std::unique_ptr<bool[]> mask(new bool[kRows * kLength]), valid(new bool[kRows]);
  for (std::int64_t i = 0; i < kRows * kLength; ++i) mask[i] = run.draw(3) > 0;
  for (std::int64_t r = 0; r < kRows; ++r) valid[r] = r != 2;
  cuda::segment_rows({mask.get(), valid.get(), kRows, kLength},
                     {run.output<std::int32_t>(kRows * kLength),
                      run.output<std::int64_t>(kRows + 1), run.output<std::int64_t>(3)},
                     run.place());
});

// Several tiles a block; steps without a token, in the end too.
const Listed compact("compact", [](Run& run) {
  std::vector<std::int32_t> step_ids;
  std::int32_t step = 0;
  for (int i = 0; i < 5000; ++i) {
    if (run.draw(9) == 0) step += static_cast<std::int32_t>(run.draw(4));
    step_ids.push_back(run.draw(3) > 0 ? step : -1);
  }
  const std::int64_t num_steps = step + 5;
  const std::int64_t num_actions =
      step_ids.size() - std::count(step_ids.begin(), step_ids.end(), -1);
  cuda::compact(
      {step_ids.data(), static_cast<std::int64_t>(step_ids.size()), num_steps, num_actions,
       run.output<std::int64_t>(num_actions), run.output<std::int64_t>(num_steps + 1),
       run.output<std::int32_t>(num_steps), run.output<std::int64_t>(num_steps)},
      run.place());
});

// More steps than the blocks take in one turn.
const Listed trajectories("row_trajectories", [](Run& run) {
  const Numbers row_steps{0, 400, 400, 900, 1000};
  Numbers each;
  for (std::int64_t s = 0; s <= 1000; ++s) each.push_back(s);
  cuda::row_trajectories({row_steps.data(), each.data(), each.data(), 4,
                          run.output<std::int64_t>(1000), run.output<std::int32_t>(1000),
                          run.output<std::int64_t>(1000), run.output<std::int64_t>(1000)},
                         run.place());
});

// Several tiles a row.
const Listed actions("mark_actions", [](Run& run) {
  const Numbers offsets{0, 600, 600, 1000};
  const Numbers starts{1, 2, 7}, start_offsets{0, 2, 3}, ends{3}, stops{4, 5}, stop_offsets{0, 2};
  Numbers token_ids;
  for (std::int64_t i = 0; i < offsets.back(); ++i) token_ids.push_back(run.draw(9));
  cuda::mark_actions(
      {token_ids.data(), offsets.data(), starts.data(), start_offsets.data(), 2, ends.data(), 1,
       stops.data(), stop_offsets.data(), 1, 3, run.output<bool>(offsets.back())},
      run.place());
});

}  // namespace
}  // namespace small_calls
