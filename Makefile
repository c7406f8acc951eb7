# Everything runs in .venv, made with nothing but Python; a second call installs nothing.
PYTHON ?= python3
# Files go to the workers whole and in the order of tests/conftest.py, the longest first.
PYTEST_FLAGS ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements-dev.lock
# The version the tests were written against.
TORCH := torch==2.13.0

.PHONY: demo demo-seeds r1-seeds quick test test-slow chaos test-plans docs lint lock bench plan-all \
  wheel clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/r1jax run tiny/r1_zero

demo-seeds: .venv/installed
	for seed in 0 1 2; do $(BIN)/r1jax run tiny/r1_zero seed=$$seed || exit 1; done

r1-seeds: .venv/installed
	for seed in 0 1 2; do $(BIN)/r1jax run tiny/r1 seed=$$seed || exit 1; done
	$(BIN)/r1jax report $(foreach seed,0 1 2,runs/r1_tiny-s$(seed)) --out runs/tiny-r1-seeds

# What a change most often breaks. Lint comes first, so that pytest's summary is the last line.
quick: lint
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow" @tests/quick.txt

# Everything but what takes long by nature, which is `test-slow`.
test: lint
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow"

test-slow: .venv/installed-test
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m slow

# Kills runs N times at random times: how many end with the bytes of one that was never killed?
N ?= 200
SEED ?= 0
chaos: .venv/installed
	$(BIN)/python tests/chaos.py --kills $(N) --seed $(SEED)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, in site/. A link that leads nowhere is an error.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv/installed
	$(BIN)/python benchmarks/rollout_and_update.py

# Every packaged config on every slice that it has settings for. What was compiled once is not
# compiled again, so a call that was stopped goes on, and one after a change does only what changed.
plan-all: .libtpu/installed
	PYTHONPATH=.libtpu $(BIN)/r1jax plan-all --cache .libtpu/compiled --out configs/PLANS.md $(PLAN_FLAGS)

# The tests that need the compilers of TPUs and GPUs: 1 GB, for which `test` does not ask, and
# .ci/run does.
test-plans: .venv/installed-test .libtpu/installed .cuda/installed
	PYTHONPATH=.libtpu $(BIN)/python -m pytest -k slice \
	  tests/planner/test_plan.py tests/planner/test_table.py tests/models/test_paged_kernel.py
	PYTHONPATH=.cuda $(BIN)/python -m pytest -k slice tests/planner/test_gpus.py

# The versions that the tests ran with, without what belongs to one machine.
lock: .venv/installed-test .venv/installed-docs
	$(BIN)/python -m pip freeze --exclude-editable --exclude r1jax | \
	  sed -n 's/^\([A-Za-z0-9._-]*==[A-Za-z0-9.]*\).*/\1/p' > requirements-dev.lock

wheel: .venv/installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv .libtpu .cuda build dist site

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Stamps: newer than pyproject.toml means that its dependencies are in.
.venv/installed: pyproject.toml requirements-dev.lock | .venv/bin/python
	$(PIP) --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP) '$(TORCH)'
	$(PIP) --editable '.[test]'
	@touch $@

.venv/installed-docs: .venv/installed
	$(PIP) --editable '.[docs]'
	@touch $@

# The TPU compiler that belongs to the installed jax (needs no TPU; 0.7 GB). Not in .venv, where JAX
# would look for a TPU at every start.
.libtpu/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target .libtpu \
	  "$$($(BIN)/python -c "$$LIBTPU")"
	@touch $@

# The GPU compiler: JAX's CUDA plug-in and NVIDIA's assembler, without CUDA's libraries (0.3 GB).
.cuda/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target .cuda \
	  --no-deps $$($(BIN)/python -c "$$CUDA") nvidia-cuda-nvcc-cu12
	@touch $@

define LIBTPU
from importlib.metadata import requires
print(next(r.partition(";")[0] for r in requires("jax") if r.startswith("libtpu")))
endef
export LIBTPU

define CUDA
from importlib.metadata import version
print(*(f"jax-cuda12-{part}=={version('jax')}" for part in ("plugin", "pjrt")))
endef
export CUDA
