// Calls of operators on small batches, by name. Each has what its kernels' barriers are there for:
// several tiles, rows and blocks.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "host_grid.h"
#include "steppo/cuda.h"

namespace small_calls {

// What a call reads and writes.
class Run {
 public:
  Run() {
    std::memset(static_cast<void*>(&workspace_), 0xFF, sizeof workspace_);
    std::memset(workspace_.counters, 0, sizeof workspace_.counters);
  }

  steppo::Place place() { return {0, &workspace_, 0, nullptr}; }

  // A number from 0 to `end` - 1.
  std::int64_t draw(std::int64_t end) {
    return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(end));
  }

  template <class T = float>
  std::vector<T> numbers(std::int64_t count) {
    std::normal_distribution<T> normal;
    std::vector<T> made(static_cast<std::size_t>(count));
    for (T& number : made) number = normal(random_) / 8;
    return made;
  }

  // Memory for outputs, full of what no kernel writes.
  template <class T>
  T* output(std::int64_t count) {
    const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(count);
    outputs_.push_back({std::unique_ptr<char[]>(new char[bytes]), bytes});
    std::memset(outputs_.back().memory.get(), 0xA5, bytes);
    return reinterpret_cast<T*>(outputs_.back().memory.get());
  }
  // The same with what a kernel overwrites.
  template <class T>
  T* output(const std::vector<T>& values) {
    T* const made = output<T>(static_cast<std::int64_t>(values.size()));
    std::memcpy(made, values.data(), sizeof(T) * values.size());
    return made;
  }

  // A number of all bits of the outputs.
  std::uint64_t digest() const {
    for (const unsigned counter : workspace_.counters) {
      if (counter != 0) throw std::runtime_error("a launch left a counter that is not 0");
    }
    std::uint64_t hash = 0xCBF29CE484222325u;
    for (const Output& output : outputs_) {
      for (std::size_t i = 0; i < output.bytes; ++i) {
        hash = (hash ^ static_cast<unsigned char>(output.memory[i])) * 0x100000001B3u;
      }
    }
    return hash;
  }

 private:
  struct Output {
    std::unique_ptr<char[]> memory;
    std::size_t bytes;
  };

  std::mt19937_64 random_{5};
  steppo::cuda::Workspace workspace_;
  std::vector<Output> outputs_;
};

using Call = void (*)(Run&);

inline std::map<std::string, Call>& all_calls() {
  static std::map<std::string, Call> calls;
  return calls;
}

// Lists a call by its name.
struct Listed {
  Listed(const char* name, Call call) { all_calls()[name] = call; }
};

}  // namespace small_calls
