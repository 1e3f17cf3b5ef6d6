// Linked into the module that tests make of the kernels: the order in which threads run.
#include "host_grid.h"

extern "C" __attribute__((visibility("default"))) void order_of_threads(std::uint64_t seed,
                                                                        int resident) {
  cuda_on_host::options = {seed, resident, ""};
}
