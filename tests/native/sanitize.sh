#!/bin/sh
# The compiled core under sanitizers: the CPU tests with AddressSanitizer and UBSan, and
# tests/native/{threads,pool}.cpp with ThreadSanitizer; then the CUDA kernels on the host, in the
# same two ways. Argument: the bin folder of the environment.
set -eu
bin=$(cd "$1" && pwd)
out=build/sanitize
cxx=${CXX:-g++}

# Runs pytest on modules that are instrumented. The interpreter is not: the runtime is loaded first, and
# its own leaks are not ours. Memory that no machine has is refused as it is without a sanitizer: with
# an exception.
instrumented() {
  LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so) $("$cxx" -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 STEPPO_SANITIZED=1 \
    PYTHONPATH="$out/lib" TRITON_INTERPRET=0 "$bin/pytest" -q -p no:cacheprovider "$@"
}

echo "== ThreadSanitizer"
mkdir -p "$out"
for program in threads pool; do
  "$cxx" -std=c++17 -O1 -g -fsanitize=thread -fopenmp-simd -Wno-psabi -pthread \
    -DSTEPPO_ISA=baseline -Icsrc/include -Icsrc/cpu csrc/cpu/*.cpp "tests/native/$program.cpp" \
    -o "$out/$program"
  "$out/$program"
done

echo "== ThreadSanitizer, CUDA on the host"
calls=$("$bin/python" tests/cuda_on_host.py small_calls -O1 -fsanitize=thread)
"$calls" 0 1 > "$out/in_order"
# Seeds, and the number of blocks whose threads take turns: the bits are the same in every order.
for order in "1 1" "5 1" "0 2" "6 2" "7 3"; do
  # shellcheck disable=SC2086
  "$calls" $order > "$out/in_another_order"
  cmp "$out/in_order" "$out/in_another_order"
done

echo "== AddressSanitizer and UBSan"
export STEPPO_SANITIZE=address,undefined
STEPPO_BUILD_CUDA=0 "$bin/python" setup.py --quiet build --build-base "$out/build" --build-lib "$out/lib"
export STEPPO_CUDA_ON_HOST=0
instrumented -n 2 -k "cpu and not compile and not opcheck" --ignore tests/rules/test_memory.py \
  tests/backends tests/fuzz tests/ground tests/layout tests/log_probs tests/losses tests/peers tests/rules

echo "== AddressSanitizer and UBSan, CUDA on the host"
# It is built here: the compiler need not run with the runtime of a sanitizer.
"$bin/python" tests/cuda_on_host.py
export STEPPO_CUDA_ON_HOST=1
instrumented -n 2 -k "cuda and not compile and not opcheck" --ignore tests/rules/test_memory.py \
  --ignore tests/cuda/test_cuda_on_host.py --ignore tests/cuda/test_mutants.py \
  tests/backends tests/cuda tests/layout tests/log_probs tests/losses tests/rules
