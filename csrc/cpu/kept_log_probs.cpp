// Log-probs and entropies over kept sets from the logits of their pairs: see
// steppo_kernels/backends/kept_operators.py.
#include "row_logits.h"

namespace steppo::cpu::STEPPO_ISA {
namespace {

template <class T>
Row<T> row_of(const KeptRows& rows, const Sets& sets, int64_t i) {
  const int64_t token = rows.rows[i], first = sets.offsets[token];
  const double temperature = rows.temperatures != nullptr ? rows.temperatures[i] : rows.temperature;
  return {static_cast<const T*>(rows.logits) + first, sets.offsets[token + 1] - first,
          rows.places[i], temperature, rows.softcap};
}

// Tasks of some sets each, of all pairs at most.
template <class F>
void for_sets(const KeptRows& rows, const Sets& sets, int threads, F&& body) {
  constexpr int64_t kSets = 64;
  parallel_blocks(rows.num_rows, kSets, worthwhile_threads(sets.num_pairs, threads),
                  [&](int64_t, int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) body(i);
                  });
}

}  // namespace

void kept_log_probs(const KeptRows& rows, const Sets& sets, const KeptLogProbs& out,
                    const Place& place) {
  with_dtype(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* const log_probs = static_cast<T*>(out.log_probs);
    T* const entropy = static_cast<T*>(out.entropy);
    const auto read =
        rows.softcap > 0
            ? (entropy != nullptr ? &read_row<true, true, T> : &read_row<true, false, T>)
            : (entropy != nullptr ? &read_row<false, true, T> : &read_row<false, false, T>);
    constexpr double kLowest = -std::numeric_limits<double>::infinity();
    for_sets(rows, sets, place.threads, [&](int64_t i) {
      const Row<T> row = row_of<T>(rows, sets, i);
      const RowResult result = row.count > 0 ? read(row) : RowResult{0, 0, {kLowest, kLowest}};
      log_probs[i] = static_cast<T>(result.log_prob);
      out.top[i] = result.log_sum_exp.top;
      out.log_sum[i] = result.log_sum_exp.log_sum;
      if (entropy != nullptr) entropy[i] = static_cast<T>(result.entropy);
    });
  });
}

void kept_log_probs_backward(const KeptRows& rows, const Sets& sets, const KeptGradients& grads,
                             const Place& place) {
  with_dtype(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* const entropy = static_cast<const T*>(grads.entropy);
    const T* const grad_log_probs = static_cast<const T*>(grads.grad_log_probs);
    const T* const grad_entropy = static_cast<const T*>(grads.grad_entropy);
    const auto write = rows.softcap > 0
                           ? (grad_entropy != nullptr ? &write_gradient<true, true, T, T>
                                                      : &write_gradient<true, false, T, T>)
                           : (grad_entropy != nullptr ? &write_gradient<false, true, T, T>
                                                      : &write_gradient<false, false, T, T>);
    for_sets(rows, sets, place.threads, [&](int64_t i) {
      const Row<T> row = row_of<T>(rows, sets, i);
      T* const out = static_cast<T*>(grads.grad_logits) + sets.offsets[rows.rows[i]];
      const double c = grad_log_probs[i];
      const double e = grad_entropy != nullptr ? grad_entropy[i] : 0.0;
      if (c == 0 && e == 0) {
        fill(out, 0, row.count, T(0));
      } else if (row.count > 0) {
        const double h = grad_entropy != nullptr ? entropy[i] : 0.0;
        write(row, out, {grads.top[i], grads.log_sum[i]}, h, c, e);
      }
    });
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
