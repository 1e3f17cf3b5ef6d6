// Log-probs and entropies of tokens from their logits: see
// steppo_kernels/log_probs/token_log_probs.py.
#include "row_logits.h"

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

  Row<In> operator[](int64_t row) const {
    return {logits + offset(row), vocabulary, token_ids[row], temperature_of(row), softcap};
  }
  bool is_masked(int64_t row) const { return mask != nullptr && !mask[row]; }
  double temperature_of(int64_t row) const {
    return temperatures != nullptr ? temperatures[row] : temperature;
  }
  int64_t offset(int64_t row) const {
    return row / length * outer_stride + row % length * inner_stride;
  }
};

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
      const RowResult result = rows.is_masked(row) ? RowResult{} : read(rows[row]);
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
      write(rows[row], out, {grads.top[row], grads.log_sum[row]}, h, c, e);
    });
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
