// The mathematics of a row of logits, for any device.
//
// Logits x are capped (optionally) and then divided by a temperature to be z. Exponents are taken
// of differences of x: for logits of any size they are exact where e^z is not small.
#pragma once

#include <cmath>
#include <cstring>

#include "steppo/step_math.h"

namespace steppo {

// e^(d / temperature) is 2^(d * scale) in fp32 and e^(d * scale) in fp64. Where d is below
// `lowest`, that is 0: d is raised to it first, so that even of an infinite d the product with the
// 0 is 0.
template <class T>
struct ExpScale {
  T scale, lowest;
};

// Both numbers stay finite at any temperature that T is used for. Without that, 0 times an infinite
// scale would be NaN, and a word at -inf would not be below an infinite `lowest`.
template <class T>
STEPPO_FN ExpScale<T> exp_scale(double temperature) {
  if constexpr (sizeof(T) == 8) {
    constexpr double kMost = 1.7e308;
    double scale = 1.0 / temperature;
    scale = scale < kMost ? scale : kMost;
    scale = scale > 800.0 / kMost ? scale : 800.0 / kMost;
    return {scale, -800.0 / scale};
  } else {
    const double scale = 1.4426950408889634 / temperature;
    return {static_cast<T>(scale), static_cast<T>(-127.0 / scale)};
  }
}

// Whether products of d and e^(d / temperature), and of these with 1 / temperature twice, stay in
// the range of fp32. Rows of fp32 logits at other temperatures are computed in fp64.
STEPPO_FN bool fits_fp32(double temperature) { return temperature > 1e-15 && temperature < 1e15; }

// For d from s.lowest to about 0; a float, or a vector of them.
template <class T>
STEPPO_FN T scaled_exp(T d, const ExpScale<float>& s) {
  // Adding 1.5 * 2^23 + 127 rounds to an integer and leaves the exponent of the result in the low
  // bits. At -127 that is 0, the exponent of the number 0.
  const T shifted = d * s.scale + 12583039.0f;
  const T r = d * s.scale - (shifted - 12583039.0f);
  typename Arithmetic<T>::Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = bits << 23;
  T power;
  std::memcpy(&power, &bits, sizeof power);
  // 2^r for |r| <= 1/2, to 1e-7.
  return power *
         (1.0f + r * (6.93147004e-1f +
                      r * (2.40222469e-1f +
                           r * (5.55071086e-2f + r * (9.67129134e-3f + r * 1.32695213e-3f)))));
}

STEPPO_FN double scaled_exp(double d, const ExpScale<double>& s) { return std::exp(d * s.scale); }

// cap * tanh(x / cap) and its derivative.
template <class T>
struct Capped {
  T value, slope;
};

template <class T>
STEPPO_FN Capped<T> soft_cap(T x, float cap, float inverse_cap) {
  typename Arithmetic<T>::Bits bits, sign;
  std::memcpy(&bits, &x, sizeof bits);
  sign = bits & 0x80000000u;
  bits = bits ^ sign;
  T size;
  std::memcpy(&size, &bits, sizeof size);
  const T twice = size * (2.0f * inverse_cap);
  // At 60 the slope is 0, as it is at infinity, and exp_parts is as good as at 20.
  const ExpParts<T> e =
      Arithmetic<T>::exp_parts(Arithmetic<T>::select(twice > 60.0f, T{} + 60.0f, twice));
  // tanh(u) = m / (m + 2) with m = e^(2 u) - 1.
  const T m = (e.scale - 1.0f) + e.scale * (e.r + e.tail);
  const T inverse = 1.0f / (m + 2.0f);
  T value = cap * (m * inverse);
  std::memcpy(&bits, &value, sizeof bits);
  bits = bits | sign;
  std::memcpy(&value, &bits, sizeof value);
  return {value, 4.0f * (m + 1.0f) * (inverse * inverse)};
}

STEPPO_FN Capped<double> soft_cap(double x, double cap, double inverse_cap) {
  const double t = std::tanh(x * inverse_cap), inverse_cosh = 1.0 / std::cosh(x * inverse_cap);
  return {cap * t, inverse_cosh * inverse_cosh};
}

// Sums over the logits of a row without its target: of e^(z - z_top), and of that times x - top.
// `top` is at least each of these logits and the target.
struct RowSums {
  double top, sum, moment;
};

// The log-sum-exp of a row is top / temperature + log_sum. Where the first term is huge, the sum of
// the two would lose the second.
struct LogSumExp {
  double top, log_sum;
};

struct RowResult {
  double log_prob, entropy;
  LogSumExp log_sum_exp;
};

// Without the target in the sum, log p of a confident token, -log(1 + sum), keeps its precision.
STEPPO_FN RowResult row_result(double target, const RowSums& s, double temperature) {
  const double d = (target - s.top) / temperature;
  const double e = std::exp(d);
  const double sum = s.sum + e;
  const double log_sum = d == 0 ? std::log1p(s.sum) : std::log(sum);
  // p log p tends to 0 with p.
  const double own = e > 0 ? e * d : 0.0;
  return {d - log_sum, log_sum - (s.moment / temperature + own) / sum, {s.top, log_sum}};
}

// What is known of a row whose token is elsewhere; its log-prob is 0.
STEPPO_FN RowResult others_result(const RowSums& s, double temperature) {
  const double log_sum = std::log(s.sum);
  const double entropy = s.sum == 0 ? 0.0 : log_sum - s.moment / temperature / s.sum;
  return {0.0, entropy, {s.top, log_sum}};
}

// The gradient of the logits of a row, dL/dx = (c [x is the target] - p (c + e (log p + H))) slope
// / temperature with log p = z - log-sum-exp and slope that of the cap, is e^d (base + rise d)
// slope with d = (x - top) / temperature, but for the target.
struct RowGradient {
  double base, rise, target;
};

STEPPO_FN RowGradient row_gradient(double target, const LogSumExp& lse, double entropy, double grad,
                                   double grad_entropy, double temperature) {
  const double log_p = (target - lse.top) / temperature - lse.log_sum;
  const double p = std::exp(log_p);
  const double own = p > 0 ? p * grad_entropy * (log_p + entropy) : 0.0;
  const double factor = -std::exp(-lse.log_sum) / temperature;
  return {factor * (grad + grad_entropy * (entropy - lse.log_sum)), factor * grad_entropy,
          (-grad * std::expm1(log_p) - own) / temperature};
}

}  // namespace steppo
