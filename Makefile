# make demo       set up, train on generated images, leave the run in runs/demo (SMOKE=1: a tiny setting)
# make test       set up, run the tests (ARGS="-k par" passes arguments to pytest)
# make parity     compare with the published code: make parity VECTORS=reference_vectors.npz, or =step_vectors.npz
# make lint       ruff and mypy
# make bench-par  time the refinement against a plain version
# make bench-step time a training step against one organized the published way
# make setup      only set up: .venv with the versions of constraints.txt
# make clean      remove .venv, runs/ and caches
#
# PYTHON=python3.12 picks the interpreter that .venv is made with (3.11 to 3.13).

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test parity lint bench-par bench-step clean

setup: $(STAMP)

# The build backend is installed first and used as it is, so that running this again needs no network.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "afa needs Python 3.11 to 3.13: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "setuptools>=77"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev,tensorboard,onnx]"
	touch $@

demo: $(STAMP)
	$(BIN)/afa demo --out runs/demo $(if $(SMOKE),--smoke)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto $(ARGS)

parity: $(STAMP)
	$(if $(VECTORS),,$(error name the file: make parity VECTORS=reference_vectors.npz))
	$(BIN)/python bench/parity.py $(VECTORS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-par: $(STAMP)
	$(BIN)/python bench/par.py

bench-step: $(STAMP)
	$(BIN)/python bench/step.py

clean:
	rm -rf .venv runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
