# Everything runs in .venv, made with nothing but Python; a second call installs nothing.
PYTHON ?= python3
PYTEST_FLAGS ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile
BIN := .venv/bin
# The version the tests were written against.
TORCH := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo demo-seeds test lint bench wheel clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/r1jax run tiny/r1_zero

demo-seeds: .venv/installed
	for seed in 0 1 2; do $(BIN)/r1jax run tiny/r1_zero seed=$$seed || exit 1; done

# Lint comes first, so that the last line is pytest's own summary.
test: .venv/installed-test lint
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m r1jax.bench

wheel: .venv/installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Stamps: newer than pyproject.toml means that its dependencies are in.
.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# On Linux, PyPI's torch drags in gigabytes of CUDA, of which the tests use nothing: its CPU build
# goes in first. Where that index is out of reach, pip falls back on what it can reach.
.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --retries 1 \
	  --extra-index-url $(TORCH_CPU_INDEX) '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@
