# Every target does its own set-up.  It needs python3.11 or newer and make; nothing is repeated while pyproject.toml is unchanged.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := all,test,dev

.PHONY: help venv demo test test-all bench check clean

help:
	@echo "make demo      reconstruct an example, leave a report in runs/demo"
	@echo "make test      the fast tests        make test-all   all of them"
	@echo "make bench     the benchmarks        make check      lint, types, layers"
	@echo "make venv      only the set-up       make clean      remove what these targets made"

venv: $(STAMP)

$(STAMP): pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "recon needs Python 3.11 or newer; this is " + sys.version + "; try: make PYTHON=python3.11")' \
	  && $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	$(BIN)/recon demo --out runs/demo --overwrite

# Two processes of one thread each; a file's tests stay together, for they share what they build.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=10

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=20

bench: $(STAMP)
	@set -e; for script in tests/benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

check: $(STAMP)
	$(BIN)/ruff check recon tests hatch_build.py
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find recon tests -name __pycache__ -type d -prune -exec rm -rf {} +
