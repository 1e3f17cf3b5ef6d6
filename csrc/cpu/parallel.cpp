// The threads behind run_tasks: those of torch's OpenMP runtime where there is one in the process,
// else a pool of our own. Baseline code: it is compiled once.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <fstream>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "steppo/floats.h"

namespace steppo::cpu {
namespace {

// Tasks that threads take until none is left. An exception, which must not leave a thread, ends all
// of it.
class Job {
 public:
  Job(int64_t count, void (*task)(void*, int64_t), void* context)
      : count_(count), task_(task), context_(context) {}

  void work() {
    const StandardFloats standard;
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
        task_(context_, i);
      }
    } catch (...) {
      next_.store(count_, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  // Once no thread works any more.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const int64_t count_;
  void (*const task_)(void*, int64_t);
  void* const context_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr error_;
};

class Pool {
 public:
  // False if a call is running on the pool already: of another thread, or the one around this one.
  bool run(Job& job, int threads) {
    if (in_use_.exchange(true, std::memory_order_acquire)) return false;
    const int workers = make_workers(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = workers;
      running_ = workers;
      ++generation_;
      signal_.store(generation_, std::memory_order_release);
    }
    wake_.notify_all();
    job.work();
    wait_for_workers(workers);
    in_use_.store(false, std::memory_order_release);
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
      Job* const job = job_;
      lock.unlock();
      job->work();
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
  std::atomic<uint64_t> signal_{0}, done_{0};
  uint64_t generation_ = 0;
  int wanted_ = 0, running_ = 0;
  Job* job_ = nullptr;
};

// Never destroyed: workers may outlive static destructors.
std::atomic<Pool*> pool{nullptr};

// Whether this process is a child of fork() and has run no program of its own since. It has none of
// the threads of its parent. OpenMP does not know that, and would wait for them forever. The system
// tells of a fork that was before this code was there; a later one tells by itself.
bool came_of_fork() {
  constexpr unsigned long kForkedWithoutExec = 0x40;
  std::ifstream file("/proc/self/stat");
  std::string text;
  std::getline(file, text);
  // The name of the program stands in parentheses and may hold any character.
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return true;
  std::istringstream fields(text.substr(name_end + 1));
  std::string skipped;
  for (int k = 0; k < 6; ++k) fields >> skipped;
  unsigned long flags = 0;
  return !(fields >> flags) || (flags & kForkedWithoutExec) != 0;
}

std::atomic<bool>& is_child() {
  static std::atomic<bool> flag{came_of_fork()};
  return flag;
}

void remember_forks() {
  static const int hooked = [] {
    is_child();
    return pthread_atfork(nullptr, nullptr, [] {
      pool.store(nullptr);
      is_child().store(true);
    });
  }();
  static_cast<void>(hooked);
}

Pool& the_pool() {
  Pool* current = pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    auto fresh = std::make_unique<Pool>();
    if (pool.compare_exchange_strong(current, fresh.get())) current = fresh.release();
  }
  return *current;
}

// Runs function(data) on so many threads: what the code of `#pragma omp parallel` calls.
using Team = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// A model has just run on these threads, which wait for their next work in a loop: they begin at
// once, and keep the threads of anyone else from the cores meanwhile. torch makes their library's
// names known to all of the process.
Team find_team() {
#if defined(__SANITIZE_THREAD__)
  return nullptr;
#else
  return reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

// Whether so many threads can be made. OpenMP ends the process if they cannot.
bool can_make(int threads) {
  std::vector<std::thread> made;
  bool all = true;
  try {
    for (int k = 0; k < threads; ++k) made.emplace_back([] {});
  } catch (const std::exception&) {
    all = false;
  }
  for (std::thread& thread : made) thread.join();
  return all;
}

// The most threads that this thread has been seen to have in a team.
thread_local int known_team = 1;

// False if there is no team. While another thread has it, this one works alone.
bool run_on_team(Job& job, int threads) {
  static const Team team = find_team();
  static std::atomic<bool> in_use{false};
  if (team == nullptr || is_child().load(std::memory_order_relaxed)) return false;
  if (known_team < threads) {
    if (!can_make(threads - 1)) return false;
    known_team = threads;
  }
  if (in_use.exchange(true, std::memory_order_acquire)) {
    job.work();
    return true;
  }
  team([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(threads),
       0);
  in_use.store(false, std::memory_order_release);
  return true;
}

}  // namespace

void run_tasks(int64_t count, int threads, void (*task)(void*, int64_t), void* context) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads > 1) {
    remember_forks();
    Job job(count, task, context);
    if (run_on_team(job, threads) || the_pool().run(job, threads)) return job.rethrow();
  }
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

}  // namespace steppo::cpu
