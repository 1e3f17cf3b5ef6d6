// Steps of tokens, for calls that take a layout.
#pragma once

#include "small_calls.h"

namespace small_calls {

// Steps of up to `longest` tokens, which follow each other, and tokens of no step between them.
struct Layout {
  std::vector<std::int32_t> step_ids, step_lengths, trajectory_counts;
  std::vector<std::int64_t> token_index, step_offsets{0}, step_starts;

  Layout(Run& run, int num_steps, int longest) {
    for (int s = 0; s < num_steps; ++s) {
      step_ids.insert(step_ids.end(), static_cast<std::size_t>(run.draw(5)), -1);
      const auto length = static_cast<std::int32_t>(run.draw(longest + 1));
      step_starts.push_back(length > 0 ? num_tokens() : -1);
      for (int i = 0; i < length; ++i) {
        token_index.push_back(num_tokens());
        step_ids.push_back(s);
      }
      step_offsets.push_back(static_cast<std::int64_t>(token_index.size()));
      step_lengths.push_back(length);
      trajectory_counts.push_back(1 + s % 3);
    }
  }

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(step_ids.size()); }
  std::int64_t num_steps() const { return static_cast<std::int64_t>(step_starts.size()); }

  steppo::Steps steps() const {
    return {step_ids.data(),
            token_index.data(),
            step_offsets.data(),
            step_starts.data(),
            trajectory_counts.data(),
            num_tokens(),
            static_cast<std::int64_t>(token_index.size()),
            num_steps()};
  }
};

}  // namespace small_calls
