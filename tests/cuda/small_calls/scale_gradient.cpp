#include "small_calls.h"

namespace small_calls {
namespace {

using namespace steppo;

// In place, in several blocks, with a rest that is no pack.
const Listed scale_gradient("scale_gradient", [](Run& run) {
  constexpr std::int64_t kCount = 2051;
  const float upstream = 0.5f;
  const double scale = 0.25;
  float* const grad = run.output(run.numbers(kCount));
  cuda::scale_gradient({kFloat32, kFloat32, kFloat32, grad, &upstream, &scale, kCount, grad},
                       run.place());
});

}  // namespace
}  // namespace small_calls
