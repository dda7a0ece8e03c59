# Two commands on a fresh machine (python3 >= 3.11 with venv, gcc): make demo, make test.
# CPU-only or CUDA: choose the torch build with TORCH and TORCH_PIP_ARGS, see README "Install".

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: install demo demo-quick test test-all gpu-test lint docs bench clean help

help:
	@echo "make demo      synthetic world -> cache -> teachers -> distilled student -> official scores -> demo/report.html"
	@echo "make test      the test suite (at most 12 minutes on 2 cores)"
	@echo "make test-all  with the long counts"
	@echo "make lint      ruff, ruff format --check, mypy"
	@echo "make docs      mkdocs build --strict"
	@echo "make bench     speed tables of tests/benchmarks"

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 12) else "imkd needs Python 3.11 or 3.12, found %d.%d; set PYTHON=python3.11" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) $(TORCH_PIP_ARGS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs,onnx]'
	@$(BIN)/python -c 'import shutil, torch; cuda = torch.version.cuda; gpu = shutil.which("nvidia-smi"); print("torch", torch.__version__, "CUDA", cuda or "none (CPU build)"); cuda and not gpu and print("warning: a CUDA build of torch is installed but no GPU was found; a CPU build is much smaller, see README Install")'
	@touch $@

demo: $(STAMP)
	$(BIN)/imkd demo --out demo

demo-quick: $(STAMP)
	$(BIN)/imkd demo --out demo --quick

test: $(STAMP)
	$(PYTEST) -n 2 --dist worksteal -m "not slow" -q

test-all: $(STAMP)
	IMKD_LONG=1 $(PYTEST) -q --timeout 3600

gpu-test: $(STAMP)
	$(PYTEST) -q -m gpu

lint: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(PYTEST) tests/benchmarks -q --benchmark-enable --timeout 3600

clean:
	rm -rf demo site .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
