// How the blocks of a kernel run on the host, in the order that a seed draws. See cuda_on_host.h.
#pragma once

#include <atomic>

#include "host_threads.h"

namespace cuda_on_host {

CUDA_ON_HOST_FN void start(Block& block, std::uint64_t flat) {
  const uint3 grid = runner.grid, threads = runner.threads;
  block.index = {static_cast<unsigned>(flat % grid.x),
                 static_cast<unsigned>(flat / grid.x % grid.y),
                 static_cast<unsigned>(flat / grid.x / grid.y)};
  const unsigned count = threads.x * threads.y * threads.z;
  block.warps.assign((count + kLanes - 1) / kLanes, Warp{});
  block.alive = static_cast<int>(count);
  block.arrived = block.line = block.votes = 0;
#if defined(__SANITIZE_THREAD__)
  runner.kept.emplace_back(new char[16 * (block.warps.size() + 1)]);
  block.phases = runner.kept.back().get();
  for (std::size_t w = 0; w < block.warps.size(); ++w) {
    block.warps[w].phases = block.phases + 16 * (w + 1);
  }
  for (auto& each : block.shared) runner.kept.push_back(std::move(each.second));
#endif
  block.shared.clear();
  for (unsigned i = 0; i < count; ++i) {
    Fiber* fiber = new_fiber();
    Warp& warp = block.warps[i / kLanes];
    fiber->block = &block;
    fiber->warp = &warp;
    fiber->flat = static_cast<int>(i);
    fiber->lane = static_cast<int>(i % kLanes);
    fiber->thread = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
    warp.lanes[fiber->lane] = fiber;
    warp.present |= 1u << fiber->lane;
    block.threads.push_back(fiber);
    runner.ready.push_back(fiber);
  }
}

CUDA_ON_HOST_FN void drop(Block& block) {
  for (Fiber* fiber : block.threads) {
#if defined(__SANITIZE_THREAD__)
    runner.left.push_back(fiber);
#else
    runner.idle.push_back(fiber);
#endif
  }
  block.threads.clear();
}

CUDA_ON_HOST_FN std::string who_waits(const std::vector<std::unique_ptr<Block>>& blocks) {
  std::string text = "no thread can go on;";
  for (const auto& block : blocks) {
    int shown = 0;
    for (const Fiber* fiber : block->threads) {
      if (fiber->wait == Wait::kDone || ++shown > 6) continue;
      text += " thread " + std::to_string(fiber->flat) + " of block " +
              std::to_string(block->index.x) + " waits at " +
              (fiber->wait == Wait::kBlock ? "a barrier" : "an operation of its warp") +
              " in line " + std::to_string(fiber->line) + ";";
    }
  }
  return text;
}

// Takes a thread that can run out of `ready`.
CUDA_ON_HOST_FN Fiber* next_thread(std::size_t& cursor) {
  auto& ready = runner.ready;
  if (options.seed == 0) {
    Fiber* fiber = ready[cursor++];
    if (cursor == ready.size()) {
      ready.clear();
      cursor = 0;
    }
    return fiber;
  }
  const std::size_t at = options.seed == 1 ? ready.size() - 1 : runner.random() % ready.size();
  Fiber* fiber = ready[at];
  ready[at] = ready.back();
  ready.pop_back();
  return fiber;
}

CUDA_ON_HOST_FN void run_blocks(const std::vector<std::unique_ptr<Block>>& blocks,
                                const std::vector<std::uint64_t>& order) {
  std::size_t next = 0, cursor = 0;
  const auto refill = [&] {
    for (const auto& block : blocks) {
      if (block->alive == 0) drop(*block);
      if (block->threads.empty() && next < order.size()) start(*block, order[next++]);
    }
  };
  for (refill(); !runner.ready.empty() && !runner.error;) {
    Fiber* fiber = next_thread(cursor);
    to_fiber(*fiber);
    if (fiber->wait == Wait::kDone && fiber->block->alive == 0) refill();
  }
  const auto is_alive = [](const auto& block) { return block->alive > 0; };
  if (std::none_of(blocks.begin(), blocks.end(), is_alive)) return;
  if (!runner.error) {
    const std::string what = "CUDA on the host: " + who_waits(blocks);
    runner.error = std::make_exception_ptr(std::runtime_error(what));
  }
  for (const auto& block : blocks) {
    for (Fiber* fiber : block->threads) {
      if (fiber->wait != Wait::kDone) to_fiber(*fiber);
    }
  }
}

CUDA_ON_HOST_FN void run(uint3 grid, uint3 threads, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  runner.grid = grid;
  runner.threads = threads;
  runner.body = &body;
  runner.state = options.seed * 0x9E3779B97F4A7C15u + 1;
#if defined(__SANITIZE_THREAD__)
  runner.tsan = __tsan_get_current_fiber();
  __tsan_release(&runner);
#endif
  {
    Unseen unseen;
    std::vector<std::uint64_t> order(std::uint64_t{grid.x} * grid.y * grid.z);
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    if (options.seed == 1) std::reverse(order.begin(), order.end());
    for (std::size_t i = order.size(); options.seed > 1 && i > 1; --i) {
      std::swap(order[i - 1], order[runner.random() % i]);
    }
    std::vector<std::unique_ptr<Block>> blocks;
    for (int i = 0; i < options.resident; ++i) blocks.emplace_back(new Block);
    run_blocks(blocks, order);
    for (const auto& block : blocks) drop(*block);
    runner.ready.clear();
#if defined(__SANITIZE_THREAD__)
    runner.kept.clear();
    // A launch comes after all that the threads of this one have done.
    for (Fiber* fiber : runner.left) runner.idle.push_back(fiber);
    runner.left.clear();
#endif
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&runner.grid);
#endif
  if (runner.error) std::rethrow_exception(std::exchange(runner.error, nullptr));
}

// Launching.

// How many launches there were in this process.
inline std::atomic<std::uint64_t> launches{0};

template <class... Parameters, class... Arguments>
inline void launch(void (*kernel)(Parameters...), uint3 grid, uint3 threads,
                   Arguments... arguments) {
  const auto refuse = [](const std::string& what) {
    throw std::invalid_argument("CUDA on the host: " + what);
  };
  const std::uint64_t count = std::uint64_t{threads.x} * threads.y * threads.z;
  if (count == 0 || count > kMostThreads) refuse(std::to_string(count) + " threads a block");
  if (grid.x == 0 || grid.x > 0x7FFFFFFFu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535) {
    refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
           std::to_string(grid.z));
  }
  ++launches;
  if (options.resident == 0) return;
  run(grid, threads, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace cuda_on_host
