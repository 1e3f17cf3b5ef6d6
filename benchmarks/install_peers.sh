#!/bin/sh
# Install verl, next to whose functions the benchmarks run, without what its trainers need (vllm,
# a GPU build of torch): its losses and estimators import with these alone. PYTHON names the
# interpreter.
set -eu
PYTHON=${PYTHON:-python}
"$PYTHON" -m pip install ray 'tensordict>=0.8,<=0.10,!=0.9' omegaconf codetiming orjson hydra-core
"$PYTHON" -m pip install --no-deps verl==0.9.1
