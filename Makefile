# Everything a contributor types. On a machine with its own torch build: make setup CONSTRAINTS=
PYTHON ?= python3
VENV ?= .venv
TEST_WORKERS ?= 2
CONSTRAINTS ?= -c constraints-cpu.txt

BIN := $(VENV)/bin
STAMP := $(VENV)/.searchlab-setup
# mypy follows the links inside searchlab/, ruff does not: it gets the folders by name.
SOURCES := searchlab spaces evaluators predictors cuda_ext experiments tests

.PHONY: setup demo test lint types bench-quick clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "searchlab needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make setup PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(CONSTRAINTS) -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/searchlab run solver_schedule --nfe 5..8 --budget 800 --name demo

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: setup
	$(BIN)/mypy

# The tests start hundreds of processes: each would compile what none may keep.
test: lint types
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

bench-quick: setup
	@for file in experiments/benchmarks/[a-z]*.py; do \
	  [ -e "$$file" ] || continue; \
	  name=$$(basename "$$file" .py); \
	  echo "== $$name" >&2; \
	  $(BIN)/python -m searchlab.experiments.benchmarks.$$name --quick || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
