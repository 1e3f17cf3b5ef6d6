// Steps to tokens and back: see steppo_kernels/layout/broadcast.py.
#include "kernel.h"

namespace steppo::cpu::STEPPO_ISA {

void broadcast_to_tokens(const Broadcast& args, const Place& place) {
  with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(args.per_step);
    T* out = static_cast<T*>(args.per_token);
    parallel_blocks(args.num_tokens, kBlock, place.threads,
                    [&](int64_t, int64_t begin, int64_t end) {
                      // Most batches of tokens lie within a step or outside of all.
                      constexpr int64_t kBatch = 32;
                      int64_t i = begin;
                      for (; i + kBatch <= end; i += kBatch) {
                        const int32_t* id = args.step_ids + i;
                        int same = 1;
                        for (int k = 0; k < kBatch; ++k) same &= id[k] == id[0];
                        if (same) {
                          const T value = id[0] >= 0 ? in[id[0]] : T(0);
                          for (int k = 0; k < kBatch; ++k) out[i + k] = value;
                        } else {
                          for (int k = 0; k < kBatch; ++k)
                            out[i + k] = id[k] >= 0 ? in[id[k]] : T(0);
                        }
                      }
                      for (; i < end; ++i)
                        out[i] = args.step_ids[i] >= 0 ? in[args.step_ids[i]] : T(0);
                    });
  });
}

void sum_over_steps(const StepSums& args, const Place& place) {
  with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(args.per_token);
    T* out = static_cast<T*>(args.per_step);
    parallel_blocks(args.num_steps, 256, place.threads, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        double sum = 0;
        for (int64_t i = args.step_offsets[s]; i < args.step_offsets[s + 1]; ++i)
          sum += in[args.token_index[i]];
        out[s] = static_cast<T>(sum);
      }
    });
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
