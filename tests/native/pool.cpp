// What tasks may do on the thread pool: throw, on whichever thread they run, and begin tasks.
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>

#include "parallel.h"

namespace {

constexpr int kTasks = 64, kThreads = 4;

bool all_run() {
  std::atomic<int> count{0};
  steppo::cpu::parallel_for(kTasks, kThreads, [&](int64_t) { ++count; });
  return count == kTasks;
}

// Whether an exception of task `bad` arrives; tasks wait for each other, so that several threads
// are at work.
bool throws(int64_t bad) {
  std::atomic<int> begun{0};
  try {
    steppo::cpu::parallel_for(kTasks, kThreads, [&](int64_t i) {
      for (++begun; begun < kThreads;) std::this_thread::yield();
      if (i == bad || bad < 0) throw std::runtime_error("task");
    });
  } catch (const std::runtime_error& error) {
    return std::string(error.what()) == "task";
  }
  return false;
}

bool nests() {
  std::atomic<int> count{0};
  steppo::cpu::parallel_for(kTasks, kThreads, [&](int64_t) {
    steppo::cpu::parallel_for(kTasks, kThreads, [&](int64_t) { ++count; });
  });
  return count == kTasks * kTasks;
}

}  // namespace

int main() {
  bool good = all_run();
  for (int64_t bad = -1; bad < kTasks; ++bad) good = throws(bad) && all_run() && good;
  good = nests() && all_run() && good;
  std::puts(good ? "pool: exceptions and nested calls" : "pool: wrong");
  return good ? 0 : 1;
}
