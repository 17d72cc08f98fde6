# Two commands matter: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-faults test-long bench-data bench-train bench-checkpoint bench-evaluation methods-table lint format

demo: .venv/installed
	$(BIN)/python pipelines/unlearn.py pipelines/recipes/demo.yaml

test: lint
	$(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/python -m pytest -m "slow and not long"

test-faults: .venv/installed
	$(BIN)/python -m pytest -m "faults and not long"

test-long: .venv/installed
	$(BIN)/python -m pytest -m long

bench-data: .venv/installed
	$(BIN)/python -m tests.scale

bench-checkpoint: .venv/installed
	$(BIN)/python -m tests.checkpoint_speed

bench-train: .venv/installed
	$(BIN)/python -m tests.speed

bench-evaluation: .venv/installed
	$(BIN)/python -m tests.evaluation_speed $(MODEL) $(DATA)

methods-table: .venv/installed
	$(BIN)/python pipelines/compare.py pipelines/recipes/comparisons/demo.yaml --into docs/methods.md

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
