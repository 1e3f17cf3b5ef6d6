// The rows of logits with a gradient: see order_live_rows in steppo_kernels/backends/operators.py.
#include "kernel.h"

namespace steppo::cpu::STEPPO_ISA {

// On one thread: a row is a number or two here, and a row of logits where it comes from.
void order_live_rows(const LiveRows& rows, const Place&) {
  with_dtype(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* grad_log_probs = static_cast<const T*>(rows.grad_log_probs);
    const T* grad_entropy = static_cast<const T*>(rows.grad_entropy);
    const auto is_live = [&](int64_t i) {
      // NaN is not 0 either.
      return grad_log_probs[i] != zero || (grad_entropy != nullptr && grad_entropy[i] != zero);
    };
    int64_t count = 0;
    for (int64_t i = 0; i < rows.num_rows; ++i) count += is_live(i);
    *rows.count = count;
    int64_t placed = 0, dead = count;
    for (int64_t i = 0; i < rows.num_rows; ++i) {
      if (!is_live(i)) {
        rows.order[dead++] = i;
      } else if (rows.ascending) {
        rows.order[placed++] = i;
      } else if (i < count) {
        rows.order[i] = i;
      } else {
        // As many dead rows lie below the count as live ones above it, and they come first among
        // the dead.
        rows.order[rows.order[count + placed++]] = i;
      }
    }
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
