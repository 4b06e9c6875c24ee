# make run    start a server with the pocket model      make test   the whole test suite
# make check  format, lint, types, tests                make help   all targets

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup run test test-gpu torture loadtest check format lint types clean

help:
	@echo "make setup   create $(VENV) and install everything into it (the others do it when needed)"
	@echo "make run     start a server (MEMORYLLM_HOST, MEMORYLLM_PORT, ... are honoured)"
	@echo "make test    run the tests (ARGS='-k chat' goes to pytest)"
	@echo "make test-gpu   what needs a GPU: kernels, parity, precision, and memory errors (PYTHON's own packages)"
	@echo "make torture break the store and the server in every way, about an hour (ARGS='kills --scale 0.1': a part)"
	@echo "make loadtest  load a server of its own, about an hour (ARGS='steady --minutes 5': a part); build/loadtest/report.html"
	@echo "make check   formatting, lint, strict types, tests"
	@echo "make format  format the code"
	@echo "make clean   remove $(VENV) and caches"
	@echo "PYTHON=python3.12 chooses the Python that $(VENV) is made with"

# The stamp is written last and holds what was installed, so that a complete environment is left alone, offline
# too, a half-made one is made anew, and a changed pyproject.toml, constraint or path installs into it. A Python
# named by the user must be the environment's own.
setup:
	@set -e; \
	want="$$({ pwd; cat pyproject.toml constraints.txt; } | cksum)"; \
	version='import sys; print(*sys.version_info[:2])'; \
	have="$$($(BIN)/python -c "$$version" 2>/dev/null || true)"; \
	if [ '$(origin PYTHON)' != file ] && [ "$$have" != "$$($(PYTHON) -c "$$version")" ]; then have=; fi; \
	if [ -n "$$have" ] && [ "$$want" = "$$(cat $(STAMP) 2>/dev/null)" ]; then exit 0; fi; \
	if [ -z "$$have" ] || [ ! -e $(STAMP) ]; then \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.12"; exit 1; }; \
		rm -rf $(VENV); \
		$(PYTHON) -m venv $(VENV); \
	fi; \
	echo "installing into $(VENV); the first time takes some minutes"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	echo "$$want" > $(STAMP)

run: setup
	@exec $(BIN)/memoryllm serve

# A file's tests share servers, so that a file is one process's.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# The GPU machine's own torch and Triton are what is tested, so nothing is installed here, and what else it has may warn.
# Most of its time goes into compiling: eight processes do it, where pytest-xdist is installed.
# Memory errors are looked for whatever the tests found. memcheck knows what cudaMalloc gave: each tensor must be of
# its own, not a piece of torch's cache.
test-gpu:
	@failed=0; at_once=; \
	if $(PYTHON) -c 'import xdist' 2>/dev/null; then at_once='-n 8'; fi; \
	$(PYTHON) -m pytest -q -W default $$at_once tests/gpu || failed=1; \
	if command -v compute-sanitizer >/dev/null; then \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
			$(PYTHON) -m pytest -q -W default --timeout 900 tests/gpu/test_kernels.py -k small || failed=1; \
	else echo "compute-sanitizer is not installed: memory errors were not looked for"; fi; \
	exit $$failed

torture: setup
	$(BIN)/python -m tests.faults $(ARGS)

loadtest: setup
	$(BIN)/python -m loadtest $(ARGS)

format: setup
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

lint: setup
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

types: setup
	$(BIN)/python -m mypy

check: lint types test

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
