// The softmax of a row of logits, and its gradient, with vectors.
#pragma once

#include <cmath>
#include <limits>

#include "row_lanes.h"

namespace steppo::cpu::STEPPO_ISA {
// Kernel files each have their own.
namespace {

// Logits that a softmax is taken over, and how they are scaled; `at` is the place of the token
// among them, -1 if it is elsewhere. A `softcap` of 0 is off.
template <class In>
struct Row {
  const In* logits;
  int64_t count, at;
  double temperature, softcap;
};

// The softcap of a row. It is 0 where there is none.
template <class In>
struct Cap {
  RowValue<In> cap, inverse;
  explicit Cap(double softcap)
      : cap(static_cast<RowValue<In>>(softcap)),
        inverse(static_cast<RowValue<In>>(softcap > 0 ? 1 / softcap : 0)) {}
  template <class T>
  __attribute__((always_inline)) Capped<T> operator()(T x) const {
    return soft_cap(x, cap, inverse);
  }
};

// Adds up a block of logits around `top`, and finds its largest; what is above `top` may overflow.
template <bool is_capped, bool need_moment, class In>
RowSums sum_block(const In* x, int64_t count, double top, const ExpScale<RowValue<In>>& scale,
                  const Cap<In>& cap) {
  using Lanes = typename RowType<In>::Lanes;
  constexpr int64_t kStep = kPairSize<In>;
  const Lanes lowest = Lanes{} + scale.lowest;
  const RowValue<In> around = static_cast<RowValue<In>>(top);
  const Lanes minus_infinity = Lanes{} - std::numeric_limits<RowValue<In>>::infinity();
  Lanes largest[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
  Lanes sum[4] = {}, moment[4] = {};
  const auto add = [&](int k, Lanes z) {
    largest[k] = larger(z, largest[k]);
    const Lanes d = larger(z - around, lowest);
    const Lanes e = scaled_exp(d, scale);
    sum[k] += e;
    if constexpr (need_moment) moment[k] += e * d;
  };
  const auto capped = [&](RowPair<In> z) {
    if constexpr (is_capped) z = {cap(z.a).value, cap(z.b).value};
    return z;
  };
  int64_t i = 0;
  for (; i + 2 * kStep <= count; i += 2 * kStep) {
    const RowPair<In> one = capped(load(x + i)), other = capped(load(x + i + kStep));
    add(0, one.a);
    add(1, one.b);
    add(2, other.a);
    add(3, other.b);
  }
  for (; i < count; i += kStep) {
    const RowPair<In> one = count - i >= kStep
                                ? capped(load(x + i))
                                : only_first<In>(capped(load(x + i, count - i)), count - i);
    add(0, one.a);
    add(1, one.b);
  }
  const Lanes high = larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
  RowSums sums{largest_of(high), 0, 0};
  for (int k = 0; k < 4; ++k) {
    sums.sum += total(sum[k]);
    if constexpr (need_moment) sums.moment += total(moment[k]);
  }
  return sums;
}

// Adds logits to the sums of a row.
template <bool is_capped, bool need_moment, class In>
void add_logits(const In* x, int64_t count, double temperature, const ExpScale<RowValue<In>>& scale,
                const Cap<In>& cap, RowSums& sums) {
  constexpr int64_t kCount = 4096;
  for (int64_t begin = 0; begin < count; begin += kCount) {
    const int64_t size = begin + kCount < count ? kCount : count - begin;
    RowSums block = sum_block<is_capped, need_moment>(x + begin, size, sums.top, scale, cap);
    if (block.top > sums.top) {
      if (sums.sum > 0) {
        const double d = sums.top - block.top, e = std::exp(d / temperature);
        sums.moment = e * (sums.moment + (e > 0 ? d : 0.0) * sums.sum);
        sums.sum *= e;
      }
      sums.top = block.top;
      block = sum_block<is_capped, need_moment>(x + begin, size, sums.top, scale, cap);
    }
    sums.sum += block.sum;
    sums.moment += block.moment;
  }
}

// One capped logit.
template <bool is_capped, class In>
Capped<RowValue<In>> capped_logit(const In& x, const Cap<In>& cap) {
  if constexpr (is_capped) return cap(to_float(x));
  return {to_float(x), 1};
}

// Whether the vectors of a type of logits can compute rows at this temperature.
template <class In>
bool fits(double temperature) {
  return sizeof(RowValue<In>) == sizeof(double) || fits_fp32(temperature);
}

// The sums of a row at a temperature that does not fit; its largest logit is at least `top`.
template <bool is_capped, class In>
RowSums wide_sums(const Row<In>& row, const Cap<In>& cap, double top) {
  const In* x = row.logits;
  const ExpScale<double> scale = exp_scale<double>(row.temperature);
  RowSums sums{top, 0, 0};
  for (int64_t i = 0; i < row.count; ++i) {
    const double z = capped_logit<is_capped>(x[i], cap).value;
    sums.top = z > sums.top ? z : sums.top;
  }
  for (int64_t i = 0; i < row.count; ++i) {
    if (i == row.at) continue;
    const double d = larger(capped_logit<is_capped>(x[i], cap).value - sums.top, scale.lowest);
    const double e = scaled_exp(d, scale);
    sums.sum += e;
    sums.moment += e * d;
  }
  return sums;
}

template <bool is_capped, bool need_moment, class In>
RowResult read_row(const Row<In>& row) {
  using Value = RowValue<In>;
  const double temperature = row.temperature;
  const ExpScale<Value> scale = exp_scale<Value>(temperature);
  const Cap<In> cap(row.softcap);
  const In* x = row.logits;
  const bool has_target = row.at >= 0;
  // A policy takes likely tokens, so that few blocks hold a larger logit than the token's.
  constexpr Value kLowest = std::numeric_limits<Value>::lowest();
  const Value target = has_target ? capped_logit<is_capped>(x[row.at], cap).value : kLowest;
  RowSums sums{target > kLowest ? target : kLowest, 0, 0};
  if (!fits<In>(temperature)) {
    sums = wide_sums<is_capped>(row, cap, sums.top);
  } else if (has_target) {
    add_logits<is_capped, need_moment>(x, row.at, temperature, scale, cap, sums);
    add_logits<is_capped, need_moment>(x + row.at + 1, row.count - row.at - 1, temperature, scale,
                                       cap, sums);
  } else {
    add_logits<is_capped, need_moment>(x, row.count, temperature, scale, cap, sums);
  }
  return has_target ? row_result(target, sums, temperature) : others_result(sums, temperature);
}

// The gradient of a row at a temperature that does not fit, or whose factors leave the range. Words
// of probability 0 have no gradient, however large these are.
template <bool is_capped, class In, class Out>
void write_wide_gradient(const Row<In>& row, Out* out, const Cap<In>& cap, double top,
                         const RowGradient& gradient) {
  const ExpScale<double> scale = exp_scale<double>(row.temperature);
  for (int64_t i = 0; i < row.count; ++i) {
    const Capped<RowValue<In>> z = capped_logit<is_capped>(row.logits[i], cap);
    const double d = larger(z.value - top, scale.lowest);
    const double factor = gradient.rise * (d * scale.scale) + gradient.base;
    store_one(out + i, scaled_exp(d, scale) * factor * z.slope);
  }
}

// Writes the gradient of a row; `out` may be its logits.
template <bool is_capped, bool has_rise, class In, class Out>
void write_gradient(const Row<In>& row, Out* out, const LogSumExp& lse, double entropy, double grad,
                    double grad_entropy) {
  using Value = RowValue<In>;
  using Lanes = typename RowType<In>::Lanes;
  constexpr int64_t kStep = kPairSize<In>;
  const Cap<In> cap(row.softcap);
  const In* x = row.logits;
  const double temperature = row.temperature;
  const bool has_target = row.at >= 0;
  const Capped<Value> target =
      has_target ? capped_logit<is_capped>(x[row.at], cap) : Capped<Value>{};
  const RowGradient gradient =
      row_gradient(target.value, lse, entropy, grad, grad_entropy, temperature);
  const Value top = static_cast<Value>(lse.top), base = static_cast<Value>(gradient.base),
              rise = static_cast<Value>(gradient.rise / temperature);
  const auto store_target = [&] {
    if (has_target) store_one(out + row.at, gradient.target * target.slope);
  };
  const bool is_finite = base - base == 0 && rise - rise == 0;
  if (!is_finite || !fits<In>(temperature)) {
    write_wide_gradient<is_capped>(row, out, cap, lse.top, gradient);
    store_target();
    return;
  }
  const ExpScale<Value> scale = exp_scale<Value>(temperature);
  const Lanes lowest = Lanes{} + scale.lowest;
  const auto slope = [&](Lanes z) {
    Lanes last = Lanes{} + Value(1);
    if constexpr (is_capped) {
      const Capped<Lanes> c = cap(z);
      z = c.value;
      last = c.slope;
    }
    const Lanes d = larger(z - top, lowest);
    const Lanes p = scaled_exp(d, scale);
    Lanes result;
    if constexpr (has_rise) {
      result = p * (d * rise + base);
    } else {
      result = p * base;
    }
    if constexpr (is_capped) result *= last;
    return result;
  };
  int64_t i = 0;
  for (; i + kStep <= row.count; i += kStep) {
    const RowPair<In> z = load(x + i);
    store_from<In>(out + i, RowPair<In>{slope(z.a), slope(z.b)});
  }
  if (const int64_t left = row.count - i; left > 0) {
    const RowPair<In> z = load(x + i, left);
    store_from<In>(out + i, RowPair<In>{slope(z.a), slope(z.b)}, left);
  }
  store_target();
}

}  // namespace
}  // namespace steppo::cpu::STEPPO_ISA
