#!/bin/sh
# Run every suite and report: sh benchmarks/run.sh [bin folder of the environment] [name]
# Results go to benchmarks/results/NAME.{json,md} and NAME_{speed,growth}.png. The exit code is 1 if
# a variant is wrong or a target is missed. For fair numbers the machine has nothing else to do.
set -eu
bin=${1:-.venv/bin}
name=${2:-cpu}
cd "$(dirname "$0")/.."
mkdir -p benchmarks/results
"$bin/python" -m pytest benchmarks --benchmark-json="benchmarks/results/$name.json"
"$bin/python" -m benchmarks.report "benchmarks/results/$name.json"
