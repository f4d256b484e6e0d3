# make demo and make test set up everything they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
# A process a core, of one thread each: that is twice as fast as one process of two threads.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
PROMPT := a red star above a blue ring on a white background

.PHONY: demo test fast lint format api wheel clean

demo: .venv/ready
	$(BIN)/artist "$(PROMPT)" -o demo.png --force
	@echo "The picture is in $(CURDIR)/demo.png"

test: .venv/ready-test
	$(TESTS)

fast: .venv/ready-test  ## the inner loop
	$(TESTS) -m "not slow"

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

api: .venv/ready
	$(BIN)/python docs/make_api.py

wheel: .venv/ready
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist *.egg-info demo.png

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/ready-test: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint]"
	touch $@
