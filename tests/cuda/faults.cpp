// Kernels with a fault each, and the same without: what tests of cuda_on_host.h run. The argument
// is a name; what went wrong is printed.
#include <cstdio>
#include <string>
#include <vector>

#include "device.cuh"

namespace {

using steppo::cuda::kAllLanes;

constexpr int kThreads = 64;

struct Room {
  double at[kThreads];
};

// Each thread reads what another one of the block wrote.
template <bool has_barrier>
__global__ void exchange(double* out) {
  STEPPO_SHARED(Room, room);
  room.at[threadIdx.x] = threadIdx.x;
  if (has_barrier) __syncthreads();
  out[threadIdx.x] = room.at[kThreads - 1 - threadIdx.x];
}

// The last block to finish adds up what all wrote.
template <bool fences_before, bool fences_after>
__global__ void sum_of_blocks(double* parts, unsigned* counter, double* total) {
  STEPPO_SHARED(unsigned, ticket);
  if (threadIdx.x == 1) parts[blockIdx.x] = blockIdx.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (fences_before) __threadfence();
    ticket = atomicInc(counter, gridDim.x - 1);
    if (fences_after) __threadfence();
  }
  __syncthreads();
  if (ticket != gridDim.x - 1 || threadIdx.x != 2) return;
  *total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) *total += parts[b];
}

// Threads count what another one sets to 0.
template <bool has_barrier>
__global__ void count(unsigned* counter) {
  if (threadIdx.x == 1) *counter = 0;
  if (has_barrier) __syncthreads();
  atomicAdd(counter, 1u);
}

__global__ void apart(double* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void stuck(double* out) {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.0, 1);
  }
}

__global__ void outside_of_mask(double* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(0xFFFFu, 1.0, 1);
}

__global__ void not_in_mask(double* out) { out[threadIdx.x] = __shfl_sync(0xFFFFu, 1.0, 0); }

__global__ void lane_has_left(double* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_sync(kAllLanes, 1.0, 0);
}

__global__ void two_operations(double* out) {
  double value = 1;
  if (threadIdx.x % 2 == 0) {
    value = __shfl_up_sync(kAllLanes, value, 1);
  } else {
    value = __shfl_down_sync(kAllLanes, value, 1);
  }
  out[threadIdx.x] = value;
}

__global__ void unwritten(double* out) {
  STEPPO_SHARED(Room, room);
  out[threadIdx.x] = room.at[threadIdx.x];
}

__global__ void overrun(double* out) {
  STEPPO_SHARED(Room, room);
  room.at[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = room.at[threadIdx.x];
}

__global__ void votes(double* out) {
  const int odd = __syncthreads_count(threadIdx.x % 2);
  const unsigned low = __ballot_sync(kAllLanes, threadIdx.x % 32 < 4);
  out[threadIdx.x] = odd + low + __any_sync(kAllLanes, 0) + __all_sync(kAllLanes, 1);
}

// What is left of a product that does not fit, if it is not rounded before the sum.
__global__ void product_and_sum(double* out) {
  const double x = out[threadIdx.x] + 1 + 0x1p-30;
  out[threadIdx.x] = x * x - (1 + 0x1p-29);
}

// By how many units of the last place 2^x is off, for many x.
__global__ void power(double* out) {
  for (float x = 0; x > -100; x -= 0.37f + 0.001f * threadIdx.x) {
    const double exact = std::exp2(double{x});
    const double off = (steppo::cuda::fast_exp2(x) - exact) * 0x1p23 / exact;
    if (x == 0 && off != 0) out[threadIdx.x] = NAN;
    if (std::fabs(off) > std::fabs(out[threadIdx.x])) out[threadIdx.x] = off;
  }
}

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  cuda_on_host::launch(kernel, {blocks, 1, 1}, {threads, 1, 1}, arguments...);
}

int run_all(const std::string& name) {
  std::vector<double> out(kThreads, 0), parts(8, 0);
  double total = 0;
  unsigned counter = 0;
  const auto one = [&](void (*kernel)(double*)) { run(kernel, 1, kThreads, out.data()); };
  const auto sum = [&](void (*kernel)(double*, unsigned*, double*)) {
    run(kernel, 8, 4, parts.data(), &counter, &total);
    std::printf("%g, counter %u\n", total, counter);
  };
  if (name == "exchange") one(exchange<true>);
  if (name == "exchange without a barrier") one(exchange<false>);
  if (name == "exchange without a barrier after a launch") {
    one(exchange<true>);
    one(exchange<false>);
  }
  if (name == "count") run(count<true>, 1, kThreads, &counter);
  if (name == "count without a barrier") run(count<false>, 1, kThreads, &counter);
  if (name.rfind("count", 0) == 0) std::printf("counter %u\n", counter);
  if (name == "sum of blocks") sum(sum_of_blocks<true, true>);
  if (name == "sum of blocks without the first fence") sum(sum_of_blocks<false, true>);
  if (name == "sum of blocks without the second fence") sum(sum_of_blocks<true, false>);
  if (name == "barriers apart") one(apart);
  if (name == "stuck") one(stuck);
  if (name == "outside of the mask") one(outside_of_mask);
  if (name == "not in the mask") one(not_in_mask);
  if (name == "a lane has left") one(lane_has_left);
  if (name == "two operations") one(two_operations);
  if (name == "unwritten") one(unwritten);
  if (name == "overrun") one(overrun);
  if (name == "votes") one(votes);
  if (name == "product and sum") one(product_and_sum);
  if (name == "power") one(power);
  if (name == "too many threads") run(exchange<true>, 1, 1025, out.data());
  std::printf("%g %g\n", out[0], out[kThreads - 1]);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    cuda_on_host::options.seed = argc > 2 ? std::stoul(argv[2]) : 0;
    return run_all(argv[1]);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 3;
  }
}
