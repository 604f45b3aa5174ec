# Each target is enough on a fresh machine with Python >= 3.10 and a C++20 compiler: it makes .venv, installs and builds.
PYTHON ?= python3
# The torch to install. Any version from 2.11 on works, CPU or CUDA build; this is the one the project is tested with.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: demo test lint format bench clean

demo: $(VENV)/installed
	$(BIN)/fastlstm demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -type f)
	$(BIN)/python benchmarks/table.py --check --readme README.md

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -type f)

# Rewrites the committed results of this machine class and the README's table from them.
bench: $(VENV)/installed
	$(BIN)/fastlstm bench --shapes all --json benchmarks/results/cpu.json --plot benchmarks/results/cpu.png
	$(BIN)/python benchmarks/table.py benchmarks/results/cpu.json --readme README.md

clean:
	rm -rf $(VENV) build fastlstm/*.so fastlstm.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastlstm needs Python 3.10 or newer, $(PYTHON) is %d.%d" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# torch comes first and the package is built against it, not against one that a build environment would choose.
$(VENV)/torch: $(VENV)/bin/python
	$(PIP) --upgrade pip "setuptools>=77" wheel "pybind11>=2.13" ninja numpy
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/installed $(VENV)/installed-dev: $(VENV)/torch $(SOURCES)
	$(PIP) --no-build-isolation --editable ".[$(if $(findstring dev,$@),dev,test)]"
	touch $@
