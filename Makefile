# The environment is made from constraints.txt on first use and again whenever it or pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint tables clean

quickstart: $(VENV)/.ready
	@echo "== quickstart (8 minutes on two cores; what is finished is used again)"
	@HF_HUB_OFFLINE=1 $(BIN)/recllm quickstart quickstart

test: $(VENV)/.ready
	@echo "== lint (seconds)"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check -q .
	@echo "== tests (about 15 minutes on two cores)"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.ready
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

tables: $(VENV)/.ready
	$(BIN)/python benchmarks/tables.py

$(VENV)/.ready: constraints.txt pyproject.toml
	@echo "== environment in $(VENV) (about 3 minutes, torch being most of it)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
