# The two commands of the README are `make demo` and `make test`. Everything but `bench`,
# `gpu-check`, `example-trl` and the other targets that test runs in .venv; each environment is made
# when it is first needed.
PYTHON ?= python3
# PyPI's Linux wheels of torch carry CUDA. For the CPU build elsewhere:
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PIP := pip==26.3
UV := uv==0.13.9
BIN := .venv/bin
# The suites of trainers, each in an environment of its own.
TRAINERS := trl trl-oldest verl skyrl
ENVIRONMENTS := .venv .venv-bench .venv-newest .venv-oldest $(TRAINERS:%=.venv-%)
NATIVE := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/include/steppo/* python/*.cpp python/*.h)
FORMATTED = $(filter %.cpp %.h %.cu %.cuh,$(NATIVE) $(wildcard csrc/cuda/* tests/native/* tests/cuda/* \
	tests/cuda/*/*))
TEST := pytest -n 2 --dist worksteal
# Where the lock has one: on Linux and x86-64.
PINNED = $(shell ls .venv/lib/python*/site-packages/nvidia/cu*/bin/nvcc 2> /dev/null)

.PHONY: install demo compare example example-replay example-accelerate example-trl
.PHONY: test test-newest test-oldest $(TRAINERS:%=test-%) lint format bench sanitize gpu-check lock clean always
# A list may be written where what it lists is not installed.
.DELETE_ON_ERROR:

install: .venv/built

demo: install
	$(BIN)/steppo-kernels demo

compare: install
	$(BIN)/steppo-kernels demo --compare --seeds 3 --out docs

example: install .venv/weights
	$(BIN)/python examples/train_smollm2.py

example-replay: install .venv/weights
	HF_HUB_OFFLINE=1 $(BIN)/python examples/replay_sampling.py

example-accelerate: install .venv/weights
	HF_HUB_OFFLINE=1 $(BIN)/python examples/train_with_accelerate.py

example-trl: .venv-trl/built .venv-trl/weights
	HF_HUB_OFFLINE=1 .venv-trl/bin/python examples/train_with_trl.py

# The CUDA kernels are built here, so that the other targets do not wait for nvcc. Ninja sees what
# has changed. The nvcc of the lock has to build them.
test: install .venv/nvcc
	STEPPO_NVCC=$(or $(STEPPO_NVCC),$(PINNED)) \
		STEPPO_BUILD_CUDA=$(or $(STEPPO_BUILD_CUDA),$(if $(PINNED),1,auto)) \
		$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/$(TEST)

# The tests that touch other people's packages, with the newest of these or with the oldest that
# pyproject.toml allows. Only torch stays what it is. Processes that tests start find the package of
# this folder, and the module that .venv has built there.
test-newest test-oldest: test-%: install .venv-%/built
	.venv-$*/bin/$(TEST) -m third_party $(OPTIONS)

# Old packages make deprecated calls of newer ones.
test-oldest: OPTIONS = -W default

# The integration of a trainer, with the trainer: trl-oldest is TRL with the oldest transformers that
# it takes. pytest fails if it collects no test, as where the trainer is missing. Trainers make
# deprecated calls of other packages.
$(TRAINERS:%=test-%): test-%: .venv-%/built
	STEPPO_CUDA_ON_HOST=0 HF_HUB_OFFLINE=1 .venv-$*/bin/pytest $(OPTIONS) -W default \
		tests/integrations/$(firstword $(subst -, ,$*))

test-trl test-trl-oldest: OPTIONS = -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

bench: .venv-bench/built
	sh benchmarks/run.sh .venv-bench/bin steps
	sh benchmarks/run.sh .venv-bench/bin vocabulary

# On a machine with an NVIDIA GPU, with what is installed there: it may have no network.
gpu-check:
	$(PYTHON) -m benchmarks.gpu $(GPU_CHECK)

sanitize: install
	sh tests/native/sanitize.sh $(BIN)

# Every version in uv.lock anew. Those of torch, pip and uv stand above and in pyproject.toml.
lock: .venv/tools
	$(BIN)/uv lock --upgrade

clean:
	rm -rf build $(ENVIRONMENTS) *.egg-info steppo_kernels/*.so steppo_kernels/*.missing

# An environment is a folder with tools, a list of exact versions, what it lists, and the package.
$(ENVIRONMENTS:%=%/tools): %/tools: Makefile
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet $(PIP) $(UV)
	touch $@

$(ENVIRONMENTS:%=%/packages): %/packages: %/requirements.txt
	$*/bin/python -m pip install --quiet $(TORCH)
	$*/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

$(ENVIRONMENTS:%=%/built): %/built: %/packages setup.py $(wildcard building/*.py) pyproject.toml $(NATIVE)
	rm -rf build/lib*
	$*/bin/python -m pip install --quiet --no-build-isolation --no-deps $(HOW)
	touch $@

# With an nvcc of the system, only the benchmarks ask for its kernels.
$(filter-out .venv-bench/built,$(ENVIRONMENTS:%=%/built)): export STEPPO_BUILD_CUDA ?= 0

.venv/built .venv-bench/built $(TRAINERS:%=.venv-%/built): HOW = --editable .
# A copy: the module that these environments build is not that of the others.
.venv-newest/built .venv-oldest/built: HOW = --force-reinstall .

# The lists. torch is installed by itself, in whichever build.
LIST = --quiet --no-header --no-emit-package torch --output-file $@
LOCKED = $(@D)/bin/uv export --locked --no-emit-project $(LIST)
RESOLVED = $(@D)/bin/uv pip compile --upgrade $(LIST)
# Trainers have environments of their own, and are none of these extras.
USUAL := --extra demo --extra example --extra triton --group test

.venv/requirements.txt: uv.lock pyproject.toml .venv/tools
	$(LOCKED) $(USUAL) --group lint

# Each is of the group that it is named after.
NAMED := bench verl skyrl
$(NAMED:%=.venv-%/requirements.txt): .venv-%/requirements.txt: uv.lock pyproject.toml .venv-%/tools
	$(LOCKED) --group $*

.venv-newest/requirements.txt: .venv-newest/tools always
	$(RESOLVED) $(USUAL) pyproject.toml

# The minima that pyproject.toml declares are what everything else is resolved with.
.venv-oldest/requirements.txt: .venv-oldest/tools always
	sed '/^\[tool\./,$$d' pyproject.toml | grep -oE '"[a-z0-9-]+>=[0-9.]+' | grep -v '"torch>=' \
		| sed 's/"//; s/>=/==/' > $(@D)/minima.txt
	$(RESOLVED) $(USUAL) --constraint $(@D)/minima.txt pyproject.toml

.venv-trl/requirements.txt: uv.lock pyproject.toml .venv-trl/tools
	$(LOCKED) --extra example --group trl

# TRL 1.16 names this minimum. Tools ask for transformers 5.
.venv-trl-oldest/requirements.txt: pyproject.toml .venv-trl-oldest/tools always
	echo transformers==4.56.2 > $(@D)/minima.txt
	$(RESOLVED) --extra example --group trl --constraint $(@D)/minima.txt pyproject.toml

# The model of the examples, and the compiler of the CUDA kernels for the tests.
.venv/weights .venv/nvcc: .venv/tools
.venv-trl/weights: .venv-trl/tools
.venv/weights .venv/nvcc .venv-trl/weights: uv.lock
	$(LOCKED) --only-group $(@F)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $@
