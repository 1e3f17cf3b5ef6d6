// The thread pool behind run_tasks. Baseline code: it is compiled once.
#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "steppo/floats.h"

namespace steppo::cpu {
namespace {

class Pool {
 public:
  // False if a call is running on the pool already: of another thread, or the one around this one.
  bool run(int64_t count, int threads, void (*task)(void*, int64_t), void* context) {
    if (in_use_.exchange(true, std::memory_order_acquire)) return false;
    const int workers = make_workers(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task;
      context_ = context;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = workers;
      running_ = workers;
      ++generation_;
      signal_.store(generation_, std::memory_order_release);
    }
    wake_.notify_all();
    drain(task, context, count);
    wait_for_workers(workers);
    const std::exception_ptr error = std::move(error_);
    error_ = nullptr;
    in_use_.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
    return true;
  }

 private:
  // Up to about 100 us for what is nearly done, and 5 us for what may come next.
  static constexpr int kFinishSpins = 4000, kIdleSpins = 200;

  // Tells the processor that this loop waits.
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  // Starts the workers that are missing of so many. Returns how many of those wanted there are.
  int make_workers(int wanted) {
    try {
      while (static_cast<int>(workers_.size()) < wanted) {
        workers_.emplace_back([this, index = static_cast<int>(workers_.size())] { work(index); });
        workers_.back().detach();
      }
    } catch (const std::exception&) {
      // The system has no thread or no memory left. A later call tries again.
    }
    const int made = static_cast<int>(workers_.size());
    return made < wanted ? made : wanted;
  }

  // Takes tasks until none is left. An exception, which must not leave a worker, ends all of it.
  void drain(void (*task)(void*, int64_t), void* context, int64_t count) {
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) {
        task(context, i);
      }
    } catch (...) {
      next_.store(count, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void wait_for_workers(int workers) {
    if (workers == 0) return;
    // Workers end within a task's time of each other, and waking up can take longer than that.
    for (int spin = 0; spin < kFinishSpins; ++spin) {
      if (done_.load(std::memory_order_acquire) == generation_) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return running_ == 0; });
  }

  void work(int index) {
    // A thread begins in the mode of the one that makes it.
    set_float_mode(kStandardFloats);
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kIdleSpins; ++spin) {
        if (signal_.load(std::memory_order_acquire) != seen) break;
        relax();
      }
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= wanted_) continue;
      auto* const task = task_;
      void* const context = context_;
      const int64_t count = count_;
      lock.unlock();
      drain(task, context, count);
      lock.lock();
      if (--running_ == 0) {
        done_.store(generation_, std::memory_order_release);
        finished_.notify_one();
      }
    }
  }

  std::atomic<bool> in_use_{false};
  std::mutex mutex_;
  std::condition_variable wake_, finished_;
  std::vector<std::thread> workers_;
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> signal_{0}, done_{0};
  uint64_t generation_ = 0;
  int wanted_ = 0, running_ = 0;
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  std::exception_ptr error_;
};

// Never destroyed: workers may outlive static destructors. A child of fork() has none of its
// parent's workers and starts a pool of its own.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  static const int hooked = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  static_cast<void>(hooked);
  Pool* current = pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    auto fresh = std::make_unique<Pool>();
    if (pool.compare_exchange_strong(current, fresh.get())) current = fresh.release();
  }
  return *current;
}

}  // namespace

void run_tasks(int64_t count, int threads, void (*task)(void*, int64_t), void* context) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads > 1 && the_pool().run(count, threads, task, context)) return;
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

}  // namespace steppo::cpu
