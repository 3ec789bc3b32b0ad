# `make demo` and `make test` need only Python 3.10+ and make: each creates .venv and installs into it.
PYTHON ?= python3
VENV ?= .venv
# The pinned CPU-friendly build; set TORCH=torch (or a CUDA wheel of your choice) to use another.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: install test quality format clean

$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[train,dev]"
	touch $@

install: $(VENV)/.installed

test: install
	$(BIN)/python -m pytest -q

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
