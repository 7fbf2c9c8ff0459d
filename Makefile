PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-gpu chaos clean

demo: .venv/core data/text/train.bin  ## train a small model on the built-in corpus
	$(BIN)/python testv2.py --preset demo

test: .venv/dev  ## style and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/dev  ## the checks that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-gpu: .venv/dev  ## that a GPU gives what the CPU gives, where there is one
	$(BIN)/python -m pytest -m gpu

chaos: .venv/dev  ## break runs on purpose, a hundred times over: half an hour
	OMP_NUM_THREADS=1 CHAOS=1 $(BIN)/python -m pytest -m 'not gpu' tests/test_reliability.py

clean:  ## remove what can be made again
	rm -rf .venv data/text build dist *.egg-info

data/text/train.bin: | .venv/core
	$(BIN)/python data/prepare.py

.venv/core: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/core
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
