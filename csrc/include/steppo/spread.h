// How far numbers lie apart, in parts that can be merged, for any device.
#pragma once

#include <cmath>

#include "steppo/types.h"

namespace steppo {

// Count, mean and sum of squared deviations from the mean. All 0 is that of no numbers.
struct Spread {
  double count, mean, squares;
};

// Chan's formula: equal numbers have no spread, to the last bit.
STEPPO_FN void merge(Spread& all, const Spread& other) {
  if (other.count == 0) return;
  if (all.count == 0) {
    // The square of a large mean could overflow, and a count of 0 would make a NaN of it.
    all = other;
    return;
  }
  const double apart = other.mean - all.mean, count = all.count + other.count;
  const double share = other.count / count;
  all.squares += other.squares + apart * apart * (all.count * share);
  all.mean += apart * share;
  all.count = count;
}

// What advantages are shifted and scaled by: with fewer than 2 of them they are only shifted.
struct Whitening {
  double mean, scale;
};

STEPPO_FN Whitening whitening(const Spread& spread) {
  // Rounding may have made it negative.
  const double squares = spread.squares < 0 ? 0 : spread.squares;
  const double scale =
      spread.count > 1 ? 1 / (std::sqrt(squares / (spread.count - 1)) + 1e-8) : 1.0;
  return {spread.mean, scale};
}

STEPPO_FN double whitened(double advantage, const Whitening& by) {
  return (advantage - by.mean) * by.scale;
}

}  // namespace steppo
