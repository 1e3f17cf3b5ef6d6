#!/bin/sh
# Install the projects next to whose functions the benchmarks run, without what their trainers need
# (vllm, a GPU build of torch). PYTHON names the interpreter.
#   verl               its losses and estimators import with these packages alone
#   trl                its functions import with accelerate and transformers, which the package's
#                      own tests have, and datasets
#   liger-kernel       what runs on a CPU needs torch, and triton to import
#   cut-cross-entropy  the same
set -eu
PYTHON=${PYTHON:-python}
"$PYTHON" -m pip install ray 'tensordict>=0.8,<=0.10,!=0.9' omegaconf codetiming orjson hydra-core
"$PYTHON" -m pip install 'datasets>=4.7'
"$PYTHON" -m pip install --no-deps verl==0.9.1 trl==1.16.0 liger-kernel==0.8.5 \
    cut-cross-entropy==25.1.1
