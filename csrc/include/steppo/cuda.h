// The C++ API of the CUDA kernels: raw device pointers and sizes, no torch, no Python.
//
// An operator launches on the device and the stream of its place. It allocates nothing and does not
// wait.
#pragma once

#include <cstddef>

#include "steppo/arguments.h"

namespace steppo::cuda {

// What the workspace of a place is. It belongs to one stream, and is zeroed before its first use; a
// launch leaves the counters at 0. Nothing else of it is read before it was written.
struct Workspace {
  static constexpr int kCounters = 1024, kParts = 384, kFields = 16, kPartials = kParts * kFields;

  unsigned counters[kCounters];
  // What blocks leave for the last of them: up to kFields numbers of each of kParts, or fewer of
  // more.
  double partials[kPartials];
  // The mean log-ratio, between two launches.
  double center;
};

// Whether the kernels were built for the host, by tests.
extern const bool kOnHost;

// The newest CUDA of the driver and that of the kernels, as 1000 * major + 10 * minor; the first is
// 0 without a driver.
struct Versions {
  int driver, runtime;
};
Versions versions();

// Loads the code of every kernel onto a device, where a launch would do it for its own. It waits
// for the device, which no stream that is captured may do.
void load(int device);

// How many kernels that are.
std::size_t num_kernels();

// Whether launches on a stream are recorded for a graph.
bool is_capturing(void* stream);

#define STEPPO_OPERATOR(name, ...) Operator<__VA_ARGS__> name;
#include "steppo/cuda_operators.inc"
#undef STEPPO_OPERATOR

}  // namespace steppo::cuda
