// Runs small calls and prints a line for each: its name, a number of all bits of its outputs, and
// the barriers and fences that its launches came to.
//
// Arguments: a seed for the order of threads, the number of blocks whose threads take turns, and if
// one is to be left out, the place of a barrier or a fence ("file:line") and the call to run.
#include <cinttypes>
#include <cstdio>
#include <set>

#include "small_calls.h"

namespace {

// Blocks of a launch, where these take turns at the work. The thread sanitizer ends at 8128
// threads.
constexpr int kMostBlocks = 3;

void run(const std::string& name, small_calls::Call call) {
  cuda_on_host::runner.reached.clear();
  small_calls::Run made;
  call(made);
  std::printf("%s %016" PRIx64, name.c_str(), made.digest());
  std::set<std::string> names;
  for (cuda_on_host::Site* site : cuda_on_host::runner.reached) {
    names.insert(site->name());
    site->is_reached = false;
  }
  for (const std::string& reached : names) std::printf(" %s", reached.c_str());
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string removed = argc > 3 ? argv[3] : "", only = argc > 4 ? argv[4] : "";
  try {
    cuda_on_host::options = {std::stoul(argv[1]), std::stoi(argv[2]), kMostBlocks, removed};
    for (const auto& [name, call] : small_calls::all_calls()) {
      if (only.empty() || only == name) run(name, call);
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 3;
  }
  return 0;
}
