#!/bin/sh
# Run a family of suites and report: sh benchmarks/run.sh [bin folder of the environment]
# [steps | vocabulary] [name]. Results go to benchmarks/results/NAME.json, .md and .png files, NAME
# being the family's unless given. The exit code is 1 if a variant is wrong or a target is missed.
# For fair numbers the machine has nothing else to do.
set -eu
bin=${1:-.venv/bin}
family=${2:-steps}
name=${3:-$family}
cd "$(dirname "$0")/.."
mkdir -p benchmarks/results
files=$("$bin/python" -m benchmarks.families "$family")
# shellcheck disable=SC2086
"$bin/python" -m pytest -c benchmarks/pytest.ini --rootdir . $files --family "$family" \
  --benchmark-json="benchmarks/results/$name.json"
"$bin/python" -m benchmarks.report "benchmarks/results/$name.json"
