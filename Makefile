# Every target does its own set-up, and can be run again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint clean

# torch first and by version: this pair is the one the lock-step of torch and triton allows, and on a machine
# without a GPU it keeps pip from taking several gigabytes of CUDA.
$(READY): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch==2.13.0" "triton==3.7.1"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# The models are tiny: a second thread only spins, and on a busy machine it makes the tests many times slower.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

demo: $(READY)
	$(BIN)/motab demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
