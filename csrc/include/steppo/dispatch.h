// What the launchers of every device do before they run a kernel.
#pragma once

#include "steppo/types.h"

namespace steppo {

static constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Calls body with a number of the dtype of a computation.
template <class F>
static inline void with_dtype(int dtype, F&& body) {
  if (dtype == kFloat64) {
    body(double{});
  } else {
    body(float{});
  }
}

}  // namespace steppo
