#include "small_calls.h"

namespace small_calls {
namespace {

using namespace steppo;

// More rows than a block takes at once, the later of which take the places of the earlier.
void live_rows(Run& run, bool ascending) {
  constexpr std::int64_t kRows = 5000;
  auto grad = run.numbers(kRows);
  for (std::int64_t i = 0; i < kRows; ++i) {
    grad[i] *= static_cast<float>(i > 3 * kRows / 4 || i % 5 == 0);
  }
  cuda::order_live_rows({kFloat32, grad.data(), nullptr, ascending, kRows,
                         run.output<std::int64_t>(kRows), run.output<std::int64_t>(1)},
                        run.place());
}

const Listed ascending("live_rows_ascending", [](Run& run) { live_rows(run, true); });
const Listed packed("live_rows_packed", [](Run& run) { live_rows(run, false); });

}  // namespace
}  // namespace small_calls
