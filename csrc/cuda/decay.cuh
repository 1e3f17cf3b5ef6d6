// Powers of the factor by which what is later counts less in GAE.
#pragma once

#include <limits>

#include "device.cuh"

namespace steppo::cuda {

// What is added to each product of powers of a factor. In one that is not next to 0 it decides
// between two roundings at most. It keeps one of a factor that is not 0 from being 0: an infinite
// advantage is infinite at all steps before it.
STEPPO_DEVICE double least_power(double factor) {
  return factor == 0 ? 0 : std::numeric_limits<double>::denorm_min();
}

// A product of powers of a factor, of which `least` is `least_power`.
STEPPO_DEVICE double times(double a, double b, double least) { return std::fma(a, b, least); }

STEPPO_DEVICE double power(double factor, unsigned exponent, double least) {
  double product = 1;
#pragma unroll
  for (int bit = 0; bit < 5; ++bit) {
    if (exponent >> bit & 1u) product = times(product, factor, least);
    factor = times(factor, factor, least);
  }
  return product;
}

}  // namespace steppo::cuda
