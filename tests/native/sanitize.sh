#!/bin/sh
# The compiled core under sanitizers: the CPU tests with AddressSanitizer and UBSan, and
# tests/native/{threads,pool}.cpp with ThreadSanitizer. Argument: the bin folder of the environment.
set -eu
bin=$(cd "$1" && pwd)
out=build/sanitize
cxx=${CXX:-g++}

echo "== ThreadSanitizer"
mkdir -p "$out"
for program in threads pool; do
  "$cxx" -std=c++17 -O1 -g -fsanitize=thread -fopenmp-simd -Wno-psabi -pthread \
    -DSTEPPO_ISA=baseline -Icsrc/include -Icsrc/cpu csrc/cpu/*.cpp "tests/native/$program.cpp" \
    -o "$out/$program"
  "$out/$program"
done

echo "== AddressSanitizer and UBSan"
STEPPO_SANITIZE=address,undefined STEPPO_BUILD_CUDA=0 "$bin/python" setup.py --quiet build \
  --build-base "$out/build" --build-lib "$out/lib"
# The interpreter is not instrumented: the runtime is loaded first, and its own leaks are not ours.
# Memory that no machine has is refused as it is without a sanitizer: with an exception.
LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so) $("$cxx" -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 STEPPO_SANITIZED=1 \
  PYTHONPATH="$out/lib" TRITON_INTERPRET=0 "$bin/pytest" -q -p no:cacheprovider \
  -n 2 -k "cpu and not compile and not opcheck" --ignore tests/rules/test_memory.py \
  tests/backends tests/fuzz tests/ground tests/layout tests/log_probs tests/losses tests/peers tests/rules
