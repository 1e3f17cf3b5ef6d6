// Log-probs and entropies of tokens from their logits: see
// steppo_kernels/log_probs/token_log_probs.py.
#include <cmath>
#include <limits>

#include "row_lanes.h"

namespace steppo::cpu::STEPPO_ISA {
namespace {

// The inputs of both passes; optional ones are null.
template <class In>
struct Rows {
  const In* logits;
  int64_t outer_stride, inner_stride, length;
  int64_t vocabulary;
  const int64_t* token_ids;
  const bool* mask;
  const double* temperatures;
  double temperature, softcap;

  Rows(const LogitRows& rows, const Targets& targets)
      : logits(static_cast<const In*>(rows.logits)),
        outer_stride(rows.outer_stride),
        inner_stride(rows.inner_stride),
        length(rows.length),
        vocabulary(rows.vocabulary),
        token_ids(targets.token_ids),
        mask(targets.mask),
        temperatures(targets.temperatures),
        temperature(targets.temperature),
        softcap(targets.softcap) {}

  bool is_masked(int64_t row) const { return mask != nullptr && !mask[row]; }
  double temperature_of(int64_t row) const {
    return temperatures != nullptr ? temperatures[row] : temperature;
  }
  int64_t offset(int64_t row) const {
    return row / length * outer_stride + row % length * inner_stride;
  }
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
RowSums wide_sums(const Rows<In>& rows, const In* x, int64_t id, double temperature,
                  const Cap<In>& cap, double top) {
  const ExpScale<double> scale = exp_scale<double>(temperature);
  RowSums sums{top, 0, 0};
  for (int64_t i = 0; i < rows.vocabulary; ++i) {
    const double z = capped_logit<is_capped>(x[i], cap).value;
    sums.top = z > sums.top ? z : sums.top;
  }
  for (int64_t i = 0; i < rows.vocabulary; ++i) {
    if (i == id) continue;
    const double d = larger(capped_logit<is_capped>(x[i], cap).value - sums.top, scale.lowest);
    const double e = scaled_exp(d, scale);
    sums.sum += e;
    sums.moment += e * d;
  }
  return sums;
}

template <bool is_capped, bool need_moment, class In>
RowResult read_row(const Rows<In>& rows, int64_t row) {
  using Value = RowValue<In>;
  const double temperature = rows.temperature_of(row);
  const ExpScale<Value> scale = exp_scale<Value>(temperature);
  const Cap<In> cap(rows.softcap);
  const In* x = rows.logits + rows.offset(row);
  const int64_t id = rows.token_ids[row];
  const Value target = capped_logit<is_capped>(x[id], cap).value;
  // A policy takes likely tokens, so that few blocks hold a larger logit than the token's.
  constexpr Value kLowest = std::numeric_limits<Value>::lowest();
  RowSums sums{target > kLowest ? target : kLowest, 0, 0};
  if (!fits<In>(temperature)) {
    sums = wide_sums<is_capped>(rows, x, id, temperature, cap, sums.top);
    return row_result(target, sums, temperature);
  }
  add_logits<is_capped, need_moment>(x, id, temperature, scale, cap, sums);
  add_logits<is_capped, need_moment>(x + id + 1, rows.vocabulary - id - 1, temperature, scale, cap,
                                     sums);
  return row_result(target, sums, temperature);
}

// The gradient of a row at a temperature that does not fit, or whose factors leave the range. Words
// of probability 0 have no gradient, however large these are.
template <bool is_capped, class In, class Out>
void write_wide_gradient(const Rows<In>& rows, const In* x, Out* out, double temperature,
                         const Cap<In>& cap, double top, const RowGradient& row) {
  const ExpScale<double> scale = exp_scale<double>(temperature);
  for (int64_t i = 0; i < rows.vocabulary; ++i) {
    const Capped<RowValue<In>> z = capped_logit<is_capped>(x[i], cap);
    const double d = larger(z.value - top, scale.lowest);
    store_one(out + i, scaled_exp(d, scale) * (row.rise * (d * scale.scale) + row.base) * z.slope);
  }
}

template <bool is_capped, bool has_rise, class In, class Out>
void write_gradient(const Rows<In>& rows, const In* x, Out* out, double temperature, int64_t id,
                    const LogSumExp& lse, double entropy, double grad, double grad_entropy) {
  using Value = RowValue<In>;
  using Lanes = typename RowType<In>::Lanes;
  constexpr int64_t kStep = kPairSize<In>;
  const Cap<In> cap(rows.softcap);
  const Capped<Value> target = capped_logit<is_capped>(x[id], cap);
  const RowGradient row = row_gradient(target.value, lse, entropy, grad, grad_entropy, temperature);
  const Value top = static_cast<Value>(lse.top), base = static_cast<Value>(row.base),
              rise = static_cast<Value>(row.rise / temperature);
  const bool is_finite = base - base == 0 && rise - rise == 0;
  if (!is_finite || !fits<In>(temperature)) {
    write_wide_gradient<is_capped>(rows, x, out, temperature, cap, lse.top, row);
    store_one(out + id, row.target * target.slope);
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
  for (; i + kStep <= rows.vocabulary; i += kStep) {
    const RowPair<In> z = load(x + i);
    store_from<In>(out + i, RowPair<In>{slope(z.a), slope(z.b)});
  }
  if (const int64_t left = rows.vocabulary - i; left > 0) {
    const RowPair<In> z = load(x + i, left);
    store_from<In>(out + i, RowPair<In>{slope(z.a), slope(z.b)}, left);
  }
  store_one(out + id, row.target * target.slope);
}

// The first row with an id that is not in the vocabulary, or -1.
int64_t first_bad_row(const Targets& targets, const int64_t* source, int64_t count,
                      int64_t vocabulary) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = source != nullptr ? source[i] : i;
    const bool is_good = targets.token_ids[row] >= 0 && targets.token_ids[row] < vocabulary;
    if (!is_good && (targets.mask == nullptr || targets.mask[row])) return row;
  }
  return -1;
}

// Tasks of about a block of logits each.
template <class F>
void for_token_rows(int64_t count, int64_t vocabulary, int threads, F&& body) {
  const int64_t size = vocabulary < kBlock ? kBlock / vocabulary : 1;
  parallel_blocks(count, size, worthwhile_threads(count * vocabulary, threads),
                  [&](int64_t, int64_t begin, int64_t end) {
                    for (int64_t row = begin; row < end; ++row) body(row);
                  });
}

}  // namespace

void token_log_probs(const LogitRows& logits, const Targets& targets, const LogProbs& out,
                     const Place& place) {
  *out.bad_row = first_bad_row(targets, nullptr, logits.num_rows, logits.vocabulary);
  if (*out.bad_row >= 0) return;
  with_logits(logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    using Value = RowValue<In>;
    const Rows<In> rows(logits, targets);
    Value* const log_probs = static_cast<Value*>(out.log_probs);
    Value* const entropy = static_cast<Value*>(out.entropy);
    const auto read =
        rows.softcap > 0
            ? (entropy != nullptr ? &read_row<true, true, In> : &read_row<true, false, In>)
            : (entropy != nullptr ? &read_row<false, true, In> : &read_row<false, false, In>);
    for_token_rows(logits.num_rows, logits.vocabulary, place.threads, [&](int64_t row) {
      const RowResult result = rows.is_masked(row) ? RowResult{} : read(rows, row);
      log_probs[row] = static_cast<Value>(result.log_prob);
      out.top[row] = result.log_sum_exp.top;
      out.log_sum[row] = result.log_sum_exp.log_sum;
      if (entropy != nullptr) entropy[row] = static_cast<Value>(result.entropy);
    });
  });
}

void token_log_probs_backward(const LogitRows& grad_logits, const LogitRows& logits,
                              const Targets& targets, const LogProbGradients& grads,
                              const Place& place) {
  const int64_t num_rows = grad_logits.num_rows, vocabulary = logits.vocabulary;
  const int64_t length = grad_logits.length, outer_stride = grad_logits.outer_stride;
  const int64_t inner_stride = grad_logits.inner_stride;
  *grads.bad_row = first_bad_row(targets, grads.source, num_rows, vocabulary);
  if (*grads.bad_row >= 0) return;
  with_gradient(logits.dtype, grad_logits.dtype, [&](auto zero, auto grad_zero) {
    using In = decltype(zero);
    using Out = decltype(grad_zero);
    using Value = RowValue<In>;
    const bool is_fresh = grad_logits.logits != logits.logits;
    if (is_fresh && inner_stride == vocabulary && outer_stride == length * vocabulary) {
      prefer_huge_pages(grad_logits.logits,
                        num_rows * vocabulary * static_cast<int64_t>(sizeof(Out)));
    }
    const Rows<In> rows(logits, targets);
    const Value* const entropy = static_cast<const Value*>(grads.entropy);
    const Value* const grad_log_probs = static_cast<const Value*>(grads.grad_log_probs);
    const Value* const grad_entropy = static_cast<const Value*>(grads.grad_entropy);
    const auto write = rows.softcap > 0
                           ? (grad_entropy != nullptr ? &write_gradient<true, true, In, Out>
                                                      : &write_gradient<true, false, In, Out>)
                           : (grad_entropy != nullptr ? &write_gradient<false, true, In, Out>
                                                      : &write_gradient<false, false, In, Out>);
    for_token_rows(num_rows, vocabulary, place.threads, [&](int64_t i) {
      Out* out = static_cast<Out*>(grad_logits.logits) + i / length * outer_stride +
                 i % length * inner_stride;
      const int64_t row = grads.source != nullptr ? grads.source[i] : i;
      const double c = grad_log_probs[row];
      const double e = grad_entropy != nullptr ? grad_entropy[row] : 0.0;
      if (rows.is_masked(row) || (c == 0 && e == 0)) {
        std::memset(static_cast<void*>(out), 0, sizeof(Out) * static_cast<size_t>(vocabulary));
        return;
      }
      const double h = grad_entropy != nullptr ? entropy[row] : 0.0;
      write(rows, rows.logits + rows.offset(row), out, rows.temperature_of(row),
            rows.token_ids[row], {grads.top[row], grads.log_sum[row]}, h, c, e);
    });
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
