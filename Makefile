# Two commands do all set-up: `make demo` and `make test` make their own .venv the first time.
PYTHON ?= python3
# Installed before all that depends on it: elsewhere name the build that fits the machine.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test test-slow lint docs bench mutants format

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "halovae needs Python 3.10 or newer"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: .venv/.installed
	$(BIN)/halovae demo --output demo

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Two workers, each with ranks of its own: servers and ranks wait more than they compute.
test: lint docs
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: .venv/.installed
	$(BIN)/pytest -m slow --timeout 3600

mutants: .venv/.installed
	$(BIN)/python scripts/mutants.py

bench: .venv/.installed
	$(BIN)/python benchmarks/exactness.py
	$(BIN)/python benchmarks/decode.py --ranks 1 2
	$(BIN)/python benchmarks/streaming.py

format: .venv/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
