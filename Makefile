# Everything a contributor runs. A fresh clone needs python3 (3.11 or newer), its venv module and make.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 4 --dist loadfile
STAMP := $(VENV)/.gatekeeper-installed
BIN := $(VENV)/bin

.PHONY: help demo test lint bench clean

help:
	@echo "make demo    see it work: a gate in front of a built-in backend, on loopback"
	@echo "make test    all tests            (PYTEST_ARGS='tests/cli -k check' for some of them)"
	@echo "make lint    ruff, mypy --strict and the import contracts"
	@echo "make bench   side by side with HAProxy and nginx"
	@echo "make clean   remove the virtual environment and caches"

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/gatekeeper demo

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	@test -d bench || { echo "there is no bench/ here" >&2; exit 3; }
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
