// A parallel loop. It runs on the threads that torch has already, found at run time: code that
// links to OpenMP may bring a second runtime, whose threads would take the cores from those of the
// first.
#pragma once

#include <cstdint>

#include "steppo/dispatch.h"

// Templates and helpers are static for the reason given at STEPPO_FN in steppo/types.h.
namespace steppo::cpu {

// Runs task(context, i) for i in [0, count) on at most `threads` threads, the caller's included.
// Which thread runs a task is not fixed: results must not depend on it. Where threads cannot be
// made, fewer of them do the work. An exception of a task leaves the tasks that nobody has begun
// undone, and is thrown here when no thread works any more.
void run_tasks(int64_t count, int threads, void (*task)(void*, int64_t), void* context);

template <class F>
static inline void parallel_for(int64_t count, int threads, F&& body) {
  run_tasks(
      count, threads, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Runs body(block, begin, end) over blocks of `size` out of `count` items. Blocks are the same
// for any number of threads, so that sums by block are too.
template <class F>
static inline void parallel_blocks(int64_t count, int64_t size, int threads, F&& body) {
  parallel_for(ceil_div(count, size), threads, [&](int64_t block) {
    const int64_t begin = block * size;
    body(block, begin, begin + size < count ? begin + size : count);
  });
}

}  // namespace steppo::cpu
