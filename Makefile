# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first; it needs CPython 3.11 alone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
export FLWR_TELEMETRY_ENABLED = 0
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: demo test test-all check bench clean

demo: $(STAMP)  ## install, then federate breast-cancer diagnosis over ten clinics
	$(BIN)/fedra run medical

test: $(STAMP)  ## the default tests, under five minutes on two cores
	$(BIN)/pytest

test-all: $(STAMP)  ## also the slow ones: Flower's own runtime, kills at random moments
	$(BIN)/pytest -m ""

check: $(STAMP)  ## lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## a short benchmark against the bare torch loop; perf/README.md has the long one
	$(BIN)/python perf/bench.py --short --turns 3

perf/.venv-pfl:  ## pfl-research in an environment of its own, for perf/bench.py
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 'pfl[pytorch]==0.6.0'

clean:
	rm -rf .venv perf/.venv-pfl build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)
