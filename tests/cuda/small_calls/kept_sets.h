// Kept sets, for calls that take them.
#pragma once

#include "small_calls.h"

namespace small_calls {

// Sets of up to `longest` ids, by token; the calls are about two of three tokens.
struct KeptSets {
  std::vector<std::int32_t> ids;
  std::vector<std::int64_t> offsets{0}, tokens, rows, places;

  KeptSets(Run& run, std::int64_t count, std::int64_t longest, std::int32_t vocabulary) {
    for (std::int64_t n = 0; n < count; ++n) {
      const std::int64_t length = run.draw(longest + 1);
      for (std::int64_t k = 0; k < length; ++k) {
        ids.push_back(static_cast<std::int32_t>(k * vocabulary / longest));
        tokens.push_back(n);
      }
      offsets.push_back(num_pairs());
      if (n % 3 == 1) continue;
      rows.push_back(n);
      places.push_back(run.draw(length + 1) - 1);
    }
  }

  std::int64_t num_pairs() const { return static_cast<std::int64_t>(ids.size()); }
  std::int64_t num_tokens() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
  std::int64_t num_rows() const { return static_cast<std::int64_t>(rows.size()); }

  steppo::Sets sets() const { return {ids.data(), offsets.data(), num_pairs(), num_tokens()}; }
};

}  // namespace small_calls
