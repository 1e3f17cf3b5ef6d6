// Runs CUDA C++ kernels on the host, for tests: a fiber a thread, switched where threads meet.
//
// csrc/cuda/device.cuh includes this header where STEPPO_CUDA_ON_HOST is defined, and the sources
// of the kernels are compiled by the host's compiler as they are. What a race or a missing barrier
// leaves to chance is drawn here: the order of threads and blocks follows a seed, shared memory
// starts as NaN, and with ThreadSanitizer each CUDA thread is a thread of its own, so that two
// accesses of which neither comes first are reported with both lines, in any order of running.
//
// What it cannot model:
// - The last bits of a GPU. Products and sums are contracted to FMAs where the host's processor has
//   them, though not the same ones as by nvcc, and what is approximate is off by as much as it may
//   be, though not by the same. Functions of a library are those of the host.
// - Speed: occupancy, registers, bank conflicts, coalescing, caches and hints to them.
// - Single instructions. Where device.cuh has one in assembly, the host has C++ that means the
//   same. The ticket of a block is two fences and an atomic there, and one atomic on a GPU.
// - Switches at any instruction. A thread runs until it meets others, comes to an atomic or ends. A
//   race in between shows with ThreadSanitizer, and need not change a number.
// - Memory that is weaker than "an atomic publishes what a fence before it covers". Atomics show in
//   the order in which they ran, and a pack of 16 bytes is never seen in halves.
// - ld.global.nc of what the same launch writes.
// - Blocks that wait for each other: a block starts when one of those that take turns has ended.
// - Clusters and their shared memory, TMA, wgmma, cooperative and programmatic dependent launches.
// - Dynamic shared memory, and how much of either kind a block may have.
// - Streams, errors that come late, and capture into graphs: a launch has ended when it returns.
// - Devices with memory of their own: an address of the host is one of the device.
// - The faults of addresses: UBSan sees misaligned packs, and ASan what lies outside of memory.
// - What nvcc refuses, such as a call of host code: the names before functions mean nothing here.
//
// With ThreadSanitizer a launch has no more than 8128 threads.
#pragma once

#include "host_grid.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace cuda_on_host {

// Arithmetic.

// A number off by up to so many units of the last place, always by the same.
CUDA_ON_HOST_FN float near_to(float number, std::uint32_t units) {
  std::uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  const std::uint32_t drawn = bits * 2654435761u >> 16;
  bits += drawn % (2 * units + 1) - units;
  float near;
  std::memcpy(&near, &bits, sizeof near);
  return near;
}

// 2^x as ex2.approx.ftz gives it: off by up to 2 units of the last place, and 0 below the normal
// range. That of 0 is 1.
CUDA_ON_HOST_FN float approximate_exp2(float x) {
  if (x < -126.0f) return 0.0f;
  const float power = std::exp2(x);
  return x == 0.0f || !std::isfinite(power) ? power : near_to(power, 2);
}

// 1 / x as rcp.approx.ftz gives it: off by up to a unit of the last place, and 0 below the normal
// range.
CUDA_ON_HOST_FN float approximate_reciprocal(float x) {
  const float reciprocal = 1.0f / x;
  if (std::fabs(reciprocal) < 1.17549435e-38f) return std::copysign(0.0f, x);
  return std::isfinite(reciprocal) ? near_to(reciprocal, 1) : reciprocal;
}

// Memory of a block.

// Memory for `tag`, fresh in each block, NaN where nothing was written, and fenced by ASan.
CUDA_ON_HOST_FN char* shared_memory(const void* tag, std::size_t bytes) {
  Unseen unseen;
  auto& memory = self().block->shared[tag];
  if (!memory) {
    memory.reset(new char[bytes + kLine]);
    std::memset(memory.get(), 0xFF, bytes + kLine);
#if defined(__SANITIZE_ADDRESS__)
    char* const first =
        memory.get() + (kLine - reinterpret_cast<std::uintptr_t>(memory.get()) % kLine) % kLine;
    __asan_poison_memory_region(first + (bytes + 7) / 8 * 8,
                                memory.get() + bytes + kLine - (first + (bytes + 7) / 8 * 8));
#endif
  }
  const auto at = reinterpret_cast<std::uintptr_t>(memory.get());
  return reinterpret_cast<char*>((at + kLine - 1) / kLine * kLine);
}

// What is asked for early has to be memory, though a GPU would forgive it: ASan looks.
CUDA_ON_HOST_FN void touch([[maybe_unused]] const void* at) {
#if defined(__SANITIZE_ADDRESS__)
  (void)*static_cast<const volatile char*>(at);
#endif
}

// The `__shared__` variable of one place in the source, for which its lambda stands.
template <class T, class Place>
CUDA_ON_HOST_FN T& shared(Place) {
  static_assert(alignof(T) <= kLine, "shared memory begins at a line");
  static const char tag = 0;
  return *reinterpret_cast<T*>(shared_memory(&tag, sizeof(T)));
}

// Meeting points.

CUDA_ON_HOST_FN void block_barrier(Site& site) {
  Unseen unseen;
  if (is_removed(site)) return;
  const int line = site.line;
  Fiber& fiber = self();
  Block& block = *fiber.block;
  if (block.arrived > 0 && block.line != line) {
    fail("threads of a block are at the barriers of lines " + std::to_string(block.line) + " and " +
         std::to_string(line));
  }
  block.line = line;
#if defined(__SANITIZE_THREAD__)
  char* const phase = block.phases + 8 * (fiber.turn ^= 1);
  __tsan_release(phase);
#endif
  const bool is_last = ++block.arrived == block.alive;
  if (is_last) {
    fiber.wait = Wait::kBlock;
    release_block(block);
  }
  wait_for(is_last ? Wait::kNone : Wait::kBlock, line);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(phase);
#endif
}

// The number of threads of the block for which `vote` holds. Without the barrier, each thread knows
// its own vote alone.
CUDA_ON_HOST_FN int block_count(bool vote, Site& site) {
  Block& block = *self().block;
  {
    Unseen unseen;
    if (is_removed(site)) return vote;
    block.votes += vote;
  }
  block_barrier(site);
  int votes;
  {
    Unseen unseen;
    votes = block.votes;
  }
  block_barrier(site);
  {
    Unseen unseen;
    block.votes = 0;
  }
  block_barrier(site);
  return votes;
}

enum Operation : int { kSync = 1, kIndex, kUp, kDown, kXor, kBallot };

// The lane whose value a lane gets.
CUDA_ON_HOST_FN int source_of(Operation operation, int lane, const Fiber& fiber) {
  const int width = fiber.width, argument = fiber.argument, base = lane / width * width;
  if (operation == kIndex) return base + (argument % width + width) % width;
  if (operation == kUp) return lane - argument >= base ? lane - argument : lane;
  if (operation == kDown) return lane + argument < base + width ? lane + argument : lane;
  if (operation == kXor) return (lane ^ argument) < base + width ? lane ^ argument : lane;
  return lane;
}

// The lane that comes last works the operation out for all.
CUDA_ON_HOST_FN std::uint64_t collective(Operation operation, unsigned mask, std::uint64_t in,
                                         int argument, int width, int line) {
  Unseen unseen;
  Fiber& fiber = self();
  Warp& warp = *fiber.warp;
  const std::string where = ", line " + std::to_string(line);
  if ((mask >> fiber.lane & 1) == 0) fail("a lane is not in its own mask" + where);
  if (mask & ~warp.present) fail("a mask names a lane that is not there or has left" + where);
  fiber.in = in;
  fiber.argument = argument;
  fiber.width = width;
#if defined(__SANITIZE_THREAD__)
  // Shuffles and votes order nothing, as on a device.
  char* const phase = operation == kSync ? warp.phases + 8 * (fiber.warp_turn ^= 1) : nullptr;
  if (phase != nullptr) __tsan_release(phase);
#endif
  int which = 0;
  while (which < warp.open && (warp.meetings[which].mask & mask) == 0) ++which;
  Meeting& meeting = warp.meetings[which];
  if (which == warp.open) {
    meeting = {mask, 0, operation, line};
    ++warp.open;
  } else if (meeting.mask != mask || meeting.operation != operation || meeting.line != line) {
    fail("lanes of a warp are at different operations, in lines " + std::to_string(meeting.line) +
         " and " + std::to_string(line));
  }
  meeting.here |= 1u << fiber.lane;
  if (meeting.here != mask) {
    wait_for(Wait::kWarp, line);
  } else {
    meeting = warp.meetings[--warp.open];
    unsigned votes = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1 && warp.lanes[lane]->in != 0) votes |= 1u << lane;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      Fiber& other = *warp.lanes[lane];
      const int from = source_of(operation, lane, other);
      if ((mask >> from & 1) == 0) fail("a lane reads one that is not in the mask" + where);
      other.out = operation == kBallot ? votes : warp.lanes[from]->in;
      if (&other != &fiber) wake(&other);
    }
  }
#if defined(__SANITIZE_THREAD__)
  if (phase != nullptr) __tsan_acquire(phase);
#endif
  return fiber.out;
}

template <class T>
CUDA_ON_HOST_FN T shuffle(Operation operation, unsigned mask, T value, int argument, int width,
                          int line) {
  static_assert(sizeof(T) <= 8, "shuffles take 4 or 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = collective(operation, mask, bits, argument, width, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

CUDA_ON_HOST_FN unsigned ballot(unsigned mask, bool vote, int line) {
  return static_cast<unsigned>(collective(kBallot, mask, vote, 0, kLanes, line));
}

CUDA_ON_HOST_FN void warp_barrier(Site& site) {
  Unseen unseen;
  if (!is_removed(site)) collective(kSync, 0xFFFFFFFFu, 0, 0, kLanes, site.line);
}

// Memory between blocks. An atomic publishes what a fence since the last one covers, and what it
// shows is covered by the next fence.

CUDA_ON_HOST_FN void fence(Site& site) {
  Unseen unseen;
  if (is_removed(site)) return;
#if defined(__SANITIZE_THREAD__)
  Fiber& fiber = self();
  fiber.has_fenced = true;
  for (void* at : fiber.seen) __tsan_acquire(at);
  fiber.seen.clear();
#endif
}

// Atomics race with what is none, but not with each other, and order nothing by themselves.
template <class T>
inline void access_atomically(T* at) {
  static_cast<void>(__atomic_fetch_add(at, T(0), __ATOMIC_RELAXED));
}

// Threads that have not met may come to an atomic in any order, and so they take turns there.
template <class T, class F>
CUDA_ON_HOST_FN T atomic(T* at, F&& change) {
  {
    Unseen unseen;
    Fiber& fiber = self();
    wake(&fiber);
    wait_for(Wait::kNone, fiber.line);
#if defined(__SANITIZE_THREAD__)
    if (fiber.has_fenced) __tsan_release(at);
    fiber.has_fenced = false;
    fiber.seen.push_back(at);
#endif
  }
  access_atomically(at);
  Unseen unseen;
  const T before = *at;
  *at = change(before);
  return before;
}

}  // namespace cuda_on_host

// The names of CUDA C++. Lines tell meeting points apart.

#define threadIdx (cuda_on_host::self().thread)
#define blockIdx (cuda_on_host::self().block->index)
#define blockDim (cuda_on_host::runner.threads)
#define gridDim (cuda_on_host::runner.grid)
#define __syncthreads() cuda_on_host::block_barrier(CUDA_ON_HOST_SITE)
#define __syncthreads_count(vote) cuda_on_host::block_count(vote, CUDA_ON_HOST_SITE)
#define __threadfence() cuda_on_host::fence(CUDA_ON_HOST_SITE)
#define __syncwarp() cuda_on_host::warp_barrier(CUDA_ON_HOST_SITE)

#define CUDA_ON_HOST_SHUFFLE(name, operation)                                                  \
  template <class T>                                                                           \
  inline T name(unsigned mask, T value, int argument, int width = cuda_on_host::kLanes,        \
                int line = __builtin_LINE()) {                                                 \
    return cuda_on_host::shuffle(cuda_on_host::operation, mask, value, argument, width, line); \
  }
CUDA_ON_HOST_SHUFFLE(__shfl_sync, kIndex)
CUDA_ON_HOST_SHUFFLE(__shfl_up_sync, kUp)
CUDA_ON_HOST_SHUFFLE(__shfl_down_sync, kDown)
CUDA_ON_HOST_SHUFFLE(__shfl_xor_sync, kXor)
#undef CUDA_ON_HOST_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return cuda_on_host::ballot(mask, vote != 0, line);
}
inline int __any_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return cuda_on_host::ballot(mask, vote != 0, line) != 0;
}
inline int __all_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return cuda_on_host::ballot(mask, vote == 0, line) == 0;
}

inline unsigned atomicAdd(unsigned* at, unsigned more) {
  return cuda_on_host::atomic(at, [=](unsigned before) { return before + more; });
}
inline unsigned atomicInc(unsigned* at, unsigned top) {
  return cuda_on_host::atomic(at, [=](unsigned before) { return before >= top ? 0u : before + 1; });
}
inline unsigned atomicOr(unsigned* at, unsigned bits) {
  return cuda_on_host::atomic(at, [=](unsigned before) { return before | bits; });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
