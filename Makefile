# SPDX-License-Identifier: Apache-2.0
# From a bare clone: `make demo`, `make test`. Everything lands in .venv and build.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?=
TORCH ?= 2.13.0
# The instruction sets of the library in .venv: native is the widest of this machine, in two thirds of the compile time of all.
SETS ?= native
# make fuzz
N ?= 20000
SEED ?= 0

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PINNED := $(PIP) -c scripts/constraints.txt
STAMPS := $(VENV)/.stamps
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
JOBS := $(shell nproc 2>/dev/null || echo 2)

NATIVE_SOURCES := $(shell find csrc/cpu csrc/cuda csrc/bindings -type f) CMakeLists.txt setup.py pyproject.toml

# The stamp alone does not prove that the library is still there.
ifneq ($(FASTASR_NATIVE),0)
ifeq ($(wildcard fastasr/_C*.so),)
NATIVE_SOURCES += rebuild
endif
endif

.PHONY: rebuild help install demo test test-long test-cpp test-cpp-long bench docs lint fuzz clean distclean

help:
	@echo "make demo       a Zipformer on real speech: upstream against fastasr, with a report"
	@echo "make test       C++ tests under sanitizers, fuzzing, the Python suite"
	@echo "make test-long  make test, thread sanitizer, long sweeps"
	@echo "make bench      measure; rows, plots and a page in bench-report/"
	@echo "make docs       the documentation as a site, in build/site"
	@echo "make lint       ruff and clang-format"
	@echo "make fuzz N=... SEED=...   random valid and invalid calls of every op"
	@echo "make clean      delete build products (distclean: .venv too)"

# --------------------------------------------------------------------------- environment
# torch comes first: whatever depends on torch would choose another one.
$(STAMPS)/torch:
	@echo "== $(VENV): torch $(TORCH)"
	python=$$(PYTHON="$(PYTHON)" scripts/find_python.sh); [[ -x $(PY) ]] || "$$python" -m venv $(VENV)
	$(PIP) torch==$(TORCH)
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/tools: $(STAMPS)/torch scripts/constraints.txt
	@echo "== $(VENV): build tools"
	$(PINNED) --no-deps triton
	$(PINNED) setuptools wheel ninja cmake pybind11 build
	touch $@

$(STAMPS)/fastasr: $(STAMPS)/tools scripts/python_headers.sh $(NATIVE_SOURCES)
	@echo "== $(VENV): fastasr, editable, with its native library"
	scripts/python_headers.sh $(PY) $(VENV)/headers > $(STAMPS)/build.env
	source $(STAMPS)/build.env; export CMAKE_ARGS="-DFASTASR_SETS='$(SETS)' $${CMAKE_ARGS:-}"; \
	  $(PINNED) --no-build-isolation -e ".[test,demo]"
	touch $@

$(STAMPS)/peers: scripts/install_peers.sh scripts/build_fast_rnnt.py | $(STAMPS)/fastasr
	@echo "== $(VENV): upstream packages"
	source $(STAMPS)/build.env; scripts/install_peers.sh $(PY)
	touch $@

$(STAMPS)/lint: $(STAMPS)/torch scripts/constraints.txt
	$(PINNED) ruff clang-format
	touch $@

$(STAMPS)/docs: $(STAMPS)/torch scripts/constraints.txt
	$(PINNED) mkdocs-material mkdocstrings-python
	touch $@

install: $(STAMPS)/fastasr $(STAMPS)/peers

# --------------------------------------------------------------------------- the two commands
demo: install
	$(PY) -m fastasr.demo $(ARGS)

test: test-cpp install $(STAMPS)/docs
	@echo "== fuzzing"
	$(PY) -m fastasr.testing.fuzz -n 2000 --seed $(SEED)
	@echo "== Python tests"
	source $(STAMPS)/build.env; scripts/python_tests.sh $(PY) "not long" $(ARGS)

test-long: test-cpp test-cpp-long install $(STAMPS)/docs
	$(PY) -m fastasr.testing.fuzz -n 100000 --seed $(SEED)
	source $(STAMPS)/build.env; scripts/python_tests.sh $(PY) "long or not long" $(ARGS)

# The C++ tests need a compiler and CMake, no Python. Here they run under sanitizers, on the widest set of this machine: the
# Python suite covers the optimised library. test-cpp-long runs every set, optimised and under every sanitizer.
test-cpp:
	@echo "== C++ tests under address and undefined-behaviour sanitizers"
	scripts/cpp_tests.sh build/cpp-asan address,undefined native

test-cpp-long:
	@echo "== C++ tests: every code path; under address, undefined-behaviour and thread sanitizers"
	scripts/cpp_tests.sh build/cpp-release ""
	scripts/cpp_tests.sh build/cpp-asan address,undefined
	scripts/cpp_tests.sh build/cpp-tsan thread

# --------------------------------------------------------------------------- the rest
fuzz: install
	$(PY) -m fastasr.testing.fuzz -n $(N) --seed $(SEED)

bench: install
	$(VENV)/bin/fastasr bench $(ARGS)

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

lint: $(STAMPS)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf build dist *.egg-info bench-report .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fastasr kernels benchmarks tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
	rm -f fastasr/_C*.so
