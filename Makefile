# make run    start a server with the pocket model      make test   the whole test suite
# make check  format, lint, types, tests                make help   all targets

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup run test check format lint types clean

help:
	@echo "make setup   create $(VENV) and install everything into it (done by the others when needed)"
	@echo "make run     start a server (MEMORYLLM_HOST, MEMORYLLM_PORT, ... are honoured)"
	@echo "make test    run the tests"
	@echo "make check   formatting, lint, strict types, tests"
	@echo "make format  format the code"
	@echo "make clean   remove $(VENV) and caches"

setup: $(STAMP)

# The stamp is written last: a half-made environment is made anew, a complete one is left alone, so that
# every target works offline after the first time.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; choose one with make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python -a -x $(BIN)/pip || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

run: $(STAMP)
	@exec $(BIN)/memoryllm serve

test: $(STAMP)
	$(BIN)/python -m pytest

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
