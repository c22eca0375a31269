# `make demo` and `make test` set up everything they need in .venv and .solo, on a bare machine with
# Python 3.10 or newer and a network that reaches PyPI.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: demo test test-solo-main check bench clean

demo: .venv/ready
	$(BIN)/headplug compare --data digits --backbone test_resnet --epochs 15 --batch-size 128 --ae-epochs 30 \
		--heads simclr,ae_embedding,reweighting --out runs/demo

# A file's tests stay in one process; each process computes on one thread.
test: .venv/ready .solo/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The tests that need a clone of solo-learn main: git clone https://github.com/vturrisi/solo-learn
test-solo-main: .venv/ready .solo/ready
	test -d "$(SOLO_LEARN_HOME)/solo" || { echo "set SOLO_LEARN_HOME to a clone of solo-learn"; exit 2; }
	SOLO_LEARN_HOME=$(SOLO_LEARN_HOME) $(BIN)/python -m pytest tests/solo tests/heads/test_sources.py

check: .venv/ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m pytest benchmarks --benchmark-only

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) install --upgrade pip
	$(PIP) install --editable '.[all]'
	touch $@

# solo-learn's release cannot be installed beside current libraries (it pins torch 1.9.1), so it and
# what it needs go into a folder of their own, which the tests put first on PYTHONPATH.
.solo/ready: .venv/ready
	$(PIP) install --no-deps --upgrade --target .solo solo-learn==1.0.2 pytorch-lightning==1.9.5 \
		lightning-bolts==0.7.0 'torchmetrics<0.12' 'setuptools<81' einops lightning-utilities scipy
	touch $@

clean:
	rm -rf .venv .solo runs
