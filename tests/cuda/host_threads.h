// The threads of a kernel on the host: a fiber each, with a stack of its own. See cuda_on_host.h.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define CUDA_ON_HOST_FN __attribute__((no_sanitize("thread"))) inline
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#else
#define CUDA_ON_HOST_FN inline
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

namespace cuda_on_host {

// What a device allows.
constexpr unsigned kMostThreads = 1024;
constexpr std::size_t kStack = 64 << 10, kPage = 4096, kLine = 64;
constexpr int kLanes = 32;

// How the next launches run.
struct Options {
  // The order of threads and blocks: 0 is theirs, 1 backwards, any other a drawn one.
  std::uint64_t seed = 0;
  // Blocks whose threads take turns. With 0, launches do nothing: what they cost is left.
  int resident = 1;
  // The most blocks of a launch whose blocks go through the work in turns, 0 for the kernel's own
  // number. With few of them a small batch takes several turns.
  std::int64_t most_blocks = 0;
  // A barrier or a fence that is not there, "file:line": what misses it?
  std::string removed;
};
inline Options options;

inline std::int64_t most_blocks(std::int64_t usual) {
  return options.most_blocks > 0 ? std::min(usual, options.most_blocks) : usual;
}

// A place in the source, where threads meet or order memory. A template has one for each of its
// instances. It is not made at run time: the guard of that would order the threads that come here.
struct Site {
  const char* file;
  int line;
  bool is_reached = false;

  std::string name() const {
    const std::string path = file;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }
};
#define CUDA_ON_HOST_SITE                                      \
  ([]() -> cuda_on_host::Site& {                               \
    static cuda_on_host::Site site{__FILE__, __LINE__, false}; \
    return site;                                               \
  }())

#if defined(__SANITIZE_THREAD__)
// What this header itself reads and writes is not the kernel's.
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};
#else
struct Unseen {
  // Not trivial, so that no compiler calls it unused.
  ~Unseen() {}
};
#endif

struct Fiber;

// Lanes on their way into one operation of a warp.
struct Meeting {
  unsigned mask = 0, here = 0;
  int operation = 0, line = 0;
};

struct Warp {
  Fiber* lanes[kLanes] = {};
  // Lanes that have not left the kernel.
  unsigned present = 0;
  Meeting meetings[kLanes];
  int open = 0;
  char* phases = nullptr;
};

struct Block {
  uint3 index{};
  std::vector<Fiber*> threads;
  std::vector<Warp> warps;
  int alive = 0, arrived = 0, line = 0, votes = 0;
  // Addresses that barriers order by: two of the block, and two of each warp, in turn. With one, a
  // thread that runs ahead would look ordered with those that have yet to leave the barrier.
  char* phases = nullptr;
  std::map<const void*, std::unique_ptr<char[]>> shared;
};

enum class Wait : char { kNone, kBlock, kWarp, kDone };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 thread{};
  int flat = 0, lane = 0, number = 0;
  Wait wait = Wait::kNone;
  int line = 0;
  // What the lane gives to an operation of its warp, and what it gets.
  std::uint64_t in = 0, out = 0;
  int argument = 0, width = kLanes;
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
  bool has_fenced = false;
  int turn = 0, warp_turn = 0;
  std::vector<void*> seen;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

struct Runner {
  std::vector<Fiber*> ready, idle;
  std::vector<std::unique_ptr<Fiber>> pool;
  Fiber* current = nullptr;
  void* stack_pointer = nullptr;
  const std::function<void()>* body = nullptr;
  uint3 grid{}, threads{};
  std::uint64_t state = 1;
  // What ended the launch before its threads.
  std::exception_ptr error;
  // Where launches have come.
  std::vector<Site*> reached;
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
  // What would hide a race, or make one up, if it were used again within a launch.
  std::vector<std::unique_ptr<char[]>> kept;
  std::vector<Fiber*> left;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  std::size_t size = 0;
  void* fake_stack = nullptr;
#endif
#if !defined(__x86_64__)
  ucontext_t context;
#endif

  std::uint64_t random() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
};
inline Runner runner;

inline Fiber& self() { return *runner.current; }

// Remembers that a launch has come to a site, and tells whether it is to go on as if there were
// none.
CUDA_ON_HOST_FN bool is_removed(Site& site) {
  if (!site.is_reached) {
    site.is_reached = true;
    runner.reached.push_back(&site);
  }
  return !options.removed.empty() && options.removed == site.name();
}

// Switching.

#if defined(__x86_64__)
// Saves what a call must keep, and exchanges stacks: a twentieth of the time of swapcontext.
extern "C" void cuda_on_host_switch(void** from, void* to);
asm(R"(
.text
.weak cuda_on_host_switch
.type cuda_on_host_switch,@function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch,.-cuda_on_host_switch
)");
#endif

CUDA_ON_HOST_FN void to_scheduler(bool is_last) {
  Fiber& fiber = self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(is_last ? nullptr : &fiber.fake_stack, runner.bottom, runner.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(runner.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  cuda_on_host_switch(&fiber.stack_pointer, runner.stack_pointer);
#else
  swapcontext(&fiber.context, &runner.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &runner.bottom, &runner.size);
#endif
  static_cast<void>(is_last);
}

CUDA_ON_HOST_FN void to_fiber(Fiber& fiber) {
  runner.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&runner.fake_stack, fiber.stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  cuda_on_host_switch(&runner.stack_pointer, fiber.stack_pointer);
#else
  swapcontext(&runner.context, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(runner.fake_stack, nullptr, nullptr);
#endif
}

CUDA_ON_HOST_FN bool has_failed() {
  Unseen unseen;
  return runner.error != nullptr;
}

// Thrown where a thread waits in a launch that has failed, so that its stack is cleared.
struct Abandoned {};

CUDA_ON_HOST_FN void wait_for(Wait what, int line) {
  self().wait = what;
  self().line = line;
  to_scheduler(false);
  if (has_failed()) throw Abandoned{};
}

CUDA_ON_HOST_FN void wake(Fiber* fiber) {
  fiber->wait = Wait::kNone;
  runner.ready.push_back(fiber);
}

// Ends the thread and the launch with an exception, which `run` throws.
[[noreturn]] CUDA_ON_HOST_FN void fail(const std::string& what) {
  throw std::runtime_error("CUDA on the host: " + what);
}

CUDA_ON_HOST_FN void release_block(Block& block) {
  block.arrived = block.line = 0;
  for (Fiber* fiber : block.threads) {
    if (fiber->wait == Wait::kBlock) wake(fiber);
  }
}

// The life of a thread.
CUDA_ON_HOST_FN void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &runner.bottom, &runner.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&runner);
#endif
  try {
    if (!has_failed()) (*runner.body)();
  } catch (const Abandoned&) {
  } catch (...) {
    Unseen unseen;
    runner.error = std::current_exception();
  }
  {
    Unseen unseen;
    Fiber& fiber = self();
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&runner.grid);
#endif
    Block& block = *fiber.block;
    fiber.wait = Wait::kDone;
    fiber.warp->present &= ~(1u << fiber.lane);
    --block.alive;
    if (block.alive > 0 && block.arrived == block.alive) release_block(block);
  }
  to_scheduler(true);
  std::abort();
}

CUDA_ON_HOST_FN Fiber* new_fiber() {
  if (runner.idle.empty()) {
    runner.pool.emplace_back(new Fiber);
    Fiber* made = runner.pool.back().get();
    made->number = static_cast<int>(runner.pool.size());
    void* memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    // A stack that is too small ends in a fault.
    mprotect(memory, kPage, PROT_NONE);
    made->stack = static_cast<char*>(memory) + kPage;
    runner.idle.push_back(made);
  }
  Fiber* fiber = runner.idle.back();
  runner.idle.pop_back();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber->stack, kStack);
  fiber->fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  if (fiber->tsan == nullptr) fiber->tsan = __tsan_create_fiber(0);
  fiber->has_fenced = false;
  fiber->turn = fiber->warp_turn = 0;
  fiber->seen.clear();
#endif
#if defined(__x86_64__)
  // Stacks begin at different lines of a page: else all would share one set of the cache.
  char* top = fiber->stack + kStack - kLine - fiber->number % 61 * 3 * kLine;
  void** at = reinterpret_cast<void**>(top);
  *--at = nullptr;
  *--at = reinterpret_cast<void*>(&entry);
  for (int saved = 0; saved < 6; ++saved) *--at = nullptr;
  fiber->stack_pointer = at;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, reinterpret_cast<void (*)()>(&entry), 0);
#endif
  fiber->wait = Wait::kNone;
  return fiber;
}

}  // namespace cuda_on_host
