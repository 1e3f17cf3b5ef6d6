// What every kernel file needs. Kernel files are compiled once per instruction set, with
// STEPPO_ISA the name of its namespace; see STEPPO_FN in steppo/types.h for what that asks of
// headers. For the same reason they use no templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "steppo/cpu.h"
#include "steppo/types.h"

namespace steppo::cpu::STEPPO_ISA {

// Memory of a call. Not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(new T[static_cast<size_t>(count > 0 ? count : 1)]) {}
  ~Buffer() { delete[] data_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) { return data_[i]; }
  T* get() { return data_; }

 private:
  T* data_;
};

// Tokens that one task takes: small enough to balance, large enough to hide the start of a task.
constexpr int64_t kBlock = 16384;

// Threads that pay for work of so many tokens: waking one takes about as long as a quarter of a
// million tokens of a loss.
static inline int worthwhile_threads(int64_t tokens, int threads) {
  constexpr int64_t kTokensPerThread = int64_t{1} << 18;
  const int64_t most = tokens / kTokensPerThread;
  return most < 1 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

// The first i in [0, count] with count == i or key(i) >= wanted; key must not decrease.
template <class Key>
static inline int64_t first_not_below(int64_t count, int64_t wanted, Key&& key) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (key(middle) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
static inline void fill(T* data, int64_t begin, int64_t end, T value) {
  for (int64_t i = begin; i < end; ++i) data[i] = value;
}

}  // namespace steppo::cpu::STEPPO_ISA
