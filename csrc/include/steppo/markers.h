// Sequences of token ids that open and close actions: see steppo_kernels/layout/segment.py.
#pragma once

#include <cstdint>

#include "steppo/types.h"

namespace steppo {

// Sequences of token ids, end to end: number k is [offsets[k], offsets[k + 1]).
struct Sequences {
  const std::int64_t* ids;
  const std::int64_t* offsets;
  std::int64_t count;
};

STEPPO_FN bool contains(const std::int64_t* values, std::int64_t count, std::int64_t wanted) {
  for (std::int64_t k = 0; k < count; ++k) {
    if (values[k] == wanted) return true;
  }
  return false;
}

// The length of the longest sequence whose tokens are those from `at` on, before `last`; 0 for
// none.
STEPPO_FN std::int64_t longest_at(const std::int64_t* token_ids, std::int64_t at, std::int64_t last,
                                  const Sequences& sequences) {
  std::int64_t longest = 0;
  for (std::int64_t k = 0; k < sequences.count; ++k) {
    const std::int64_t begin = sequences.offsets[k], length = sequences.offsets[k + 1] - begin;
    if (length <= longest || at + length > last) continue;
    std::int64_t same = 0;
    while (same < length && token_ids[at + same] == sequences.ids[begin + same]) ++same;
    if (same == length) longest = length;
  }
  return longest;
}

// Whether the token before `at` completes a sequence that is the longest of those that begin where
// it does. Those lie in [first, last).
STEPPO_FN bool starts_behind(const std::int64_t* token_ids, std::int64_t first, std::int64_t last,
                             std::int64_t at, const Sequences& sequences) {
  for (std::int64_t k = 0; k < sequences.count; ++k) {
    const std::int64_t end = sequences.offsets[k + 1], length = end - sequences.offsets[k];
    if (at - length < first || token_ids[at - 1] != sequences.ids[end - 1]) continue;
    if (longest_at(token_ids, at - length, last, sequences) == length) return true;
  }
  return false;
}

}  // namespace steppo
