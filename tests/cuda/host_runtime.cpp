// Linked into what tests make of the kernels: the order in which threads run, a count of launches,
// and what csrc/cuda/runtime.cu asks of CUDA.
#include "host_grid.h"
#include "launch.h"
#include "steppo/cuda.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void order_of_threads(std::uint64_t seed, int resident) {
  cuda_on_host::options = {seed, resident, 0, ""};
}

EXPORTED void limit_blocks(std::int64_t most) { cuda_on_host::options.most_blocks = most; }

EXPORTED std::uint64_t count_of_launches() { return cuda_on_host::launches; }

namespace steppo::cuda {

const bool kOnHost = true;
Versions versions() { return {0, 0}; }
void load(int) {}
std::size_t num_kernels() { return all_kernels().size(); }
bool is_capturing(void*) { return false; }

}  // namespace steppo::cuda
