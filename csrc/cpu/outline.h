// What a first look at the steps of a layout tells, a few bytes a step.
#pragma once

#include "kernel.h"

namespace steppo::cpu::STEPPO_ISA {

struct Outline {
  double steps = 0, trajectories = 0;  // not empty ones; a sum of 1 / count where it is asked for
  bool is_ascending = true;            // every step lies in one piece, behind the one before it
};

// `counts` are the trajectory counts, or null. Steps that are empty are where they like.
static inline Outline outline(const int64_t* offsets, const int64_t* starts, const int32_t* counts,
                              int64_t num_steps, int threads) {
  constexpr int64_t kSteps = 16384;
  const int64_t blocks = ceil_div(num_steps, kSteps);
  struct Part {
    Outline outline;
    int64_t first = -1, end = 0;  // where the first step of the block begins and the last one ends
  };
  Buffer<Part> parts(blocks);
  parallel_blocks(num_steps, kSteps, threads, [&](int64_t b, int64_t begin, int64_t end) {
    Part part;
    int64_t found = 0;
    double sum = 0;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t length = offsets[s + 1] - offsets[s];
      if (length == 0) continue;
      ++found;
      if (counts != nullptr) sum += 1.0 / counts[s];
      part.outline.is_ascending &= starts[s] >= part.end;
      if (part.first < 0) part.first = starts[s];
      part.end = starts[s] + length;
    }
    part.outline.steps = static_cast<double>(found);
    part.outline.trajectories = sum;
    parts[b] = part;
  });
  Outline all;
  int64_t end = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const Part& part = parts[b];
    all.steps += part.outline.steps;
    all.trajectories += part.outline.trajectories;
    if (part.outline.steps == 0) continue;
    all.is_ascending &= part.outline.is_ascending && part.first >= end;
    end = part.end;
  }
  return all;
}

}  // namespace steppo::cpu::STEPPO_ISA
