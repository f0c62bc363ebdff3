# `make demo` and `make test` set everything up from nothing; both are quick to repeat.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_FOR_TESTS := $(VENV)/.ready-for-tests
# Processes that tests run in, of one thread and up to 3 GB each.
WORKERS ?= 2

# Benchmark data sets, where they lie beside the checkout; tests that need them skip where they are absent.
ifneq ($(wildcard ../shared/data),)
export IBKE_DATA ?= $(abspath ../shared/data)
endif

.PHONY: demo test env clean

demo: $(READY)
	$(BIN)/ibke demo

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

env: $(READY_FOR_TESTS)

# torch goes first, alone: PIP_EXTRA_INDEX_URL may name where its CPU build is (docs/how-to/install.md).
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "IBKE needs Python 3.11 or newer; set PYTHON=…")'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(READY_FOR_TESTS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,lm-eval,peft,plots]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
