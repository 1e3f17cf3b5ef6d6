// Steps to tokens and back: see steppo_kernels/layout/broadcast.py.
#include "launch.h"
#include "steppo/cuda.h"

namespace steppo::cuda {
namespace {

constexpr int kThreads = 256;
// Ids that a thread takes at once, 16 bytes.
constexpr int kIds = 4;

template <class T>
STEPPO_DEVICE T value_of(const T* per_step, std::int32_t id) {
  return id >= 0 ? per_step[id] : T(0);
}

// A thread takes kIds tokens; those that are left over at the end are taken one by one. Without
// `is_wide`, all are: addresses may be any.
template <class T, bool is_wide>
__global__ void __launch_bounds__(kThreads)
    broadcast_kernel(const T* per_step, const std::int32_t* step_ids, T* per_token,
                     std::int64_t num_tokens) {
  const std::int64_t first = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * kIds;
  if (is_wide && first + kIds <= num_tokens) {
    const auto ids = *reinterpret_cast<const Pack<std::int32_t, kIds>*>(step_ids + first);
    constexpr int kValues = 16 / sizeof(T);
#pragma unroll
    for (int part = 0; part < kIds; part += kValues) {
      Pack<T, kValues> values;
#pragma unroll
      for (int k = 0; k < kValues; ++k) values.at[k] = value_of(per_step, ids.at[part + k]);
      *reinterpret_cast<Pack<T, kValues>*>(per_token + first + part) = values;
    }
    return;
  }
  for (std::int64_t i = first; i < first + kIds && i < num_tokens; ++i) {
    per_token[i] = value_of(per_step, step_ids[i]);
  }
}

// A warp takes a step.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const T* per_token, const std::int64_t* token_index,
               const std::int64_t* step_offsets, T* per_step, std::int64_t num_steps) {
  const std::int64_t step = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  // The lanes of a warp leave together: they meet in the sum.
  if (step >= num_steps) return;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t end = step_offsets[step + 1];
  double sum = 0;
  for (std::int64_t i = step_offsets[step] + lane; i < end; i += kWarp) {
    sum += static_cast<double>(per_token[token_index[i]]);
  }
  sum = sum_of_lanes<kWarp>(sum);
  if (lane == 0) per_step[step] = static_cast<T>(sum);
}

}  // namespace

void broadcast_to_tokens(const Broadcast& args, const Place& place) {
  const Launcher launch("broadcast_to_tokens", place);
  const std::int64_t blocks = ceil_div(args.num_tokens, kThreads * kIds);
  const bool wide = is_wide(args.step_ids) && is_wide(args.per_token);
  with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(wide ? listed<broadcast_kernel<T, true>>() : listed<broadcast_kernel<T, false>>(),
           blocks, kThreads, static_cast<const T*>(args.per_step), args.step_ids,
           static_cast<T*>(args.per_token), args.num_tokens);
  });
}

void sum_over_steps(const StepSums& args, const Place& place) {
  const Launcher launch("sum_over_steps", place);
  with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(listed<sum_kernel<T>>(), ceil_div(args.num_steps * kWarp, kThreads), kThreads,
           static_cast<const T*>(args.per_token), args.token_index, args.step_offsets,
           static_cast<T*>(args.per_step), args.num_steps);
  });
}

}  // namespace steppo::cuda
