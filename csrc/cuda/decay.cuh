// Powers of the factor by which what is later counts less in GAE.
#pragma once

#include <limits>

#include "device.cuh"

namespace steppo::cuda {

// A product of powers of a factor. That of a factor which is not 0 is not 0 either: an infinite
// advantage is infinite at all steps before it.
STEPPO_DEVICE double times(double a, double b) {
  const double product = a * b;
  return product > 0 || a == 0 || b == 0 ? product : std::numeric_limits<double>::denorm_min();
}

STEPPO_DEVICE double power(double factor, unsigned exponent) {
  double product = 1;
#pragma unroll
  for (int bit = 0; bit < 5; ++bit) {
    if (exponent >> bit & 1u) product = times(product, factor);
    factor = times(factor, factor);
  }
  return product;
}

}  // namespace steppo::cuda
