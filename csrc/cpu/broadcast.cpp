// Steps to tokens and back: see steppo_kernels/layout/broadcast.py.
#include "kernel.h"

namespace steppo::cpu::STEPPO_ISA {

void broadcast_to_tokens(int dtype, const void* per_step, const int32_t* step_ids,
                         int64_t num_tokens, void* per_token, int threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(per_step);
    T* out = static_cast<T*>(per_token);
    parallel_blocks(num_tokens, kBlock, threads, [&](int64_t, int64_t begin, int64_t end) {
      // Most batches of tokens lie within a step or outside of all.
      constexpr int64_t kBatch = 32;
      int64_t i = begin;
      for (; i + kBatch <= end; i += kBatch) {
        const int32_t* id = step_ids + i;
        int same = 1;
        for (int k = 0; k < kBatch; ++k) same &= id[k] == id[0];
        if (same) {
          const T value = id[0] >= 0 ? in[id[0]] : T(0);
          for (int k = 0; k < kBatch; ++k) out[i + k] = value;
        } else {
          for (int k = 0; k < kBatch; ++k) out[i + k] = id[k] >= 0 ? in[id[k]] : T(0);
        }
      }
      for (; i < end; ++i) out[i] = step_ids[i] >= 0 ? in[step_ids[i]] : T(0);
    });
  });
}

void sum_over_steps(int dtype, const void* per_token, const int64_t* token_index,
                    const int64_t* step_offsets, int64_t num_steps, void* per_step, int threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(per_token);
    T* out = static_cast<T*>(per_step);
    parallel_blocks(num_steps, 256, threads, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        double sum = 0;
        for (int64_t i = step_offsets[s]; i < step_offsets[s + 1]; ++i) sum += in[token_index[i]];
        out[s] = static_cast<T>(sum);
      }
    });
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
