# Each target is enough on a fresh machine with Python >= 3.10 and a C++20 compiler: it makes .venv, installs and builds.
PYTHON ?= python3
# The torch to install. Any version from 2.11 on works, CPU or CUDA build; this is the one the project is tested with.
TORCH ?= torch==2.13.0

# Committed results of `make bench`, and the README's table and plot.
RESULTS := benchmarks/results/amd-zen3-2cores
H200 := benchmarks/results/h200/bench

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH_STAMP := $(VENV)/$(subst =,_,$(TORCH)).installed
CPP := $(shell find csrc tests/host_cuda -name '*.cpp' -o -name '*.cu*' -o -name '*.h' -o -name '*.inl')
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: demo test sanitize lint format bench gpu clean

demo: $(VENV)/installed
	$(BIN)/fastlstm demo

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The operators' tests with kernels built for the address and undefined-behaviour sanitizers, AVX-512 emulated. GCC's
# runtime library has to come before all others; Python itself is not free of leaks.
SANITIZED := build/sanitize
sanitize: $(VENV)/installed
	FASTLSTM_SANITIZE=1 FASTLSTM_CUDA=0 $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	PYTHONPATH=$(SANITIZED)/lib ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	$(BIN)/pytest -q tests/test_ops.py tests/test_lengths_and_resets.py tests/test_functions.py tests/test_layer_norm.py \
	-k "not opcheck and not compile"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/python benchmarks/table.py $(RESULTS).json --readme README.md --plot $(RESULTS).png --check
	$(BIN)/python benchmarks/table.py $(H200).json --readme docs/h200.md --plot $(H200).png --check
	$(BIN)/python benchmarks/table.py benchmarks/results/h200/families_warpgroup.json --readme docs/cuda.md --check
	$(BIN)/python benchmarks/table.py $(RESULTS)-features.json --readme docs/features.md --check
	$(BIN)/python benchmarks/table.py benchmarks/results/amd-zen5-2cores.json --readme docs/cpu-performance.md --check
	$(BIN)/python benchmarks/table.py benchmarks/results/amd-zen5-2cores-accuracy.json --readme docs/accuracy.md --check

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Name the file after your machine: make bench RESULTS=benchmarks/results/NAME
bench: $(VENV)/installed
	$(BIN)/fastlstm bench --shapes all --json $(RESULTS).json
	$(BIN)/python benchmarks/table.py $(RESULTS).json --readme README.md --plot $(RESULTS).png

# On a machine with an NVIDIA GPU, whose own Python has a torch for CUDA: builds in place, tests, measures; see gpu.sh.
OUT ?= build/gpu
gpu:
	PYTHON="$(PYTHON)" benchmarks/gpu.sh "$(OUT)"

clean:
	rm -rf $(VENV) build fastlstm/*.so fastlstm.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastlstm needs Python 3.10 or newer, $(PYTHON) is %d.%d" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# torch comes first and the package is built against it, not against one that a build environment would choose.
$(TORCH_STAMP): | $(VENV)/bin/python
	$(PIP) --upgrade pip "setuptools>=77" wheel "pybind11>=2.13" ninja numpy
	$(PIP) "$(TORCH)"
	rm -f $(VENV)/torch*.installed
	touch $@

$(VENV)/installed: $(TORCH_STAMP) $(SOURCES)
	$(PIP) --no-build-isolation --editable ".[test]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --group dev
	touch $@
