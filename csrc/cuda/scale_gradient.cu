// A saved gradient times the factors that came later: out = grad * (upstream * scale).
#include "launch.h"
#include "packs.cuh"
#include "steppo/cuda.h"
#include "steppo/halves.h"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 256;

// Numbers of a thread: those of 16 bytes of the narrower type.
template <class In, class Out>
constexpr int kTogether = kPack<In> > kPack<Out> ? kPack<In> : kPack<Out>;

// What is exactly 0, as it is at masked tokens, stays so, whatever the factor is. `out` may be
// `grad` itself: a thread reads what it writes, and no other does.
template <class In, class Out, bool is_wide>
__global__ void __launch_bounds__(kThreads, 4)
    scale_gradient_kernel(const In* grad, const GradientScaling args, Out* out) {
  using Value = RowValue<In>;
  constexpr int kCount = kTogether<In, Out>;
  const double upstream = args.upstream_dtype == kFloat64
                              ? *static_cast<const double*>(args.upstream)
                              : static_cast<double>(*static_cast<const float*>(args.upstream));
  const auto factor = static_cast<Value>(args.scale != nullptr ? upstream * *args.scale : upstream);
  const auto scaled = [factor](Value x) { return x == 0 ? x : x * factor; };
  const std::int64_t first = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * kCount;
  if (is_wide && first + kCount <= args.count) {
    const auto numbers = load_numbers<kCount, true>(grad + first);
#pragma unroll
    for (int part = 0; part < kCount; part += kPack<Out>) {
      Value x[kPack<Out>];
#pragma unroll
      for (int k = 0; k < kPack<Out>; ++k) x[k] = scaled(to_number(numbers.at[part + k]));
      store_once(reinterpret_cast<Pack<Out, kPack<Out>>*>(out + first + part), packed<Out>(x));
    }
    return;
  }
  for (std::int64_t i = first; i < first + kCount && i < args.count; ++i) {
    store_number(out + i, scaled(to_number(grad[i])));
  }
}

}  // namespace

void scale_gradient(const GradientScaling& args, const Place& place) {
  const Launcher launch("scale_gradient", place);
  with_gradient(args.grad_dtype, args.out_dtype, [&](auto zero, auto out_zero) {
    using In = decltype(zero);
    using Out = decltype(out_zero);
    const auto* const grad = static_cast<const In*>(args.grad);
    auto* const out = static_cast<Out*>(args.out);
    launch(is_wide(grad) && is_wide(out) ? listed<scale_gradient_kernel<In, Out, true>>()
                                         : listed<scale_gradient_kernel<In, Out, false>>(),
           ceil_div(args.count, kThreads * kTogether<In, Out>), kThreads, grad, args, out);
  });
}

}  // namespace steppo::cuda
