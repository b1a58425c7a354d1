# `make demo` and `make test` set up all they need: a virtual environment in .venv, the package in
# editable mode, and for tests the development tools. Only Python >= 3.10, git and make must be there.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# Keeps the repository's root off sys.path, where kernels/ would hide the Hub's package of that name.
export PYTHONSAFEPATH := 1
# Setup compiles no bytecode. Where none could be kept either, every process would compile torch's and
# transformers' modules anew, for ten seconds and more.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo test bench lint types compile compile-cpu compile-gpu wheel gpu clean

help:
	@echo "make demo    set up what it needs, then sample from the bundled trio and measure it"
	@echo "make test    set up, then lint, type-check, compile every kernel and run every test, WORKERS=$(WORKERS) at a time"
	@echo "make setup   set up for development, in .venv"
	@echo "make lint    check the style of the Python"
	@echo "make types   check its types"
	@echo "make compile compile for this CPU, and every GPU kernel for every target, which needs no GPU"
	@echo "make bench   time kernels and rounds on this CPU, and compare with the last time"
	@echo "make gpu     test and measure on this machine's NVIDIA GPU, with PYTHON's own packages"
	@echo "make wheel   build the wheel into dist/"
	@echo "make clean   remove the virtual environment and build products"

setup: $(VENV)/.installed

# The demonstration needs no more than its own extra, which is among those of development: either may come first.
$(VENV)/.installed: EXTRA := dev
$(VENV)/.installed-for-demo: EXTRA := cpu
$(VENV)/.installed $(VENV)/.installed-for-demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[$(EXTRA)]'
	touch $(VENV)/.installed-for-demo $@

demo: $(VENV)/.installed-for-demo
	$(BIN)/speculative-eft demo

# Numba, linters and types are one process at a time. Triton takes ten minutes and more for every variant and target.
# MALLOC_PERTURB_ has glibc fill memory that is freed, so that a compiled function that still reads it fails.
test: setup
	$(MAKE) --jobs=2 compile lint types COMPILE_OPTIONS=--sparsely
	MALLOC_PERTURB_=128 $(BIN)/pytest -n $(WORKERS)

# Kept in .benchmarks/, by machine; without an earlier run there is nothing to compare with.
bench: setup
	$(BIN)/pytest -o addopts='-q --import-mode=importlib' bench/suites --benchmark-autosave \
	    --benchmark-columns=median,iqr,rounds --benchmark-group-by=func --benchmark-sort=name \
	    $(if $(wildcard .benchmarks/*/*.json),--benchmark-compare --benchmark-compare-fail=median:30%)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The import package as setuptools will map it, for what follows folders and knows no such mapping.
define mapped_package
	@rm -rf .build/$(1) && mkdir -p .build/$(1)/speculative_eft
	@ln -s $(CURDIR)/speculative_eft/* .build/$(1)/speculative_eft/
	@ln -s $(addprefix $(CURDIR)/,kernels models decoding bench) .build/$(1)/speculative_eft/
endef

types: setup
	$(call mapped_package,types)
	cd .build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p speculative_eft

compile: compile-cpu compile-gpu

# What Numba compiles is kept beside the source.
compile-cpu: setup
	@if $(BIN)/python -c 'import numba' 2> /dev/null; then \
		$(BIN)/python -c 'import speculative_eft.models.llama_cpu, speculative_eft.kernels.cpu.round_end'; \
	else echo "Numba is not installed: nothing was compiled for CPUs"; fi

# Triton is not to be had on every system.
compile-gpu: setup
	@if $(BIN)/python -c 'import triton' 2> /dev/null; then \
		env -u TRITON_INTERPRET $(BIN)/python -m speculative_eft.kernels.compile $(COMPILE_OPTIONS); \
	else echo "Triton is not installed: no kernel was compiled"; fi

# Installs nothing. GPU_OPTIONS="--quick --seconds TOTAL --only STAGE --out DIR".
gpu:
	@$(PYTHON) -c 'import sys; from importlib.util import find_spec; \
	    missing = [name for name in ("torch", "triton", "transformers", "pytest") if find_spec(name) is None]; \
	    sys.exit(f"PYTHON={sys.executable} lacks " + ", ".join(missing) if missing else 0)'
	$(call mapped_package,gpu)
	@PYTHONPATH=$(CURDIR)/.build/gpu $(PYTHON) -m speculative_eft.bench.gpu $(GPU_OPTIONS)

wheel: setup
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) .build build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
