# `make demo` and `make test` need only Python 3.10+ and make: each creates .venv and installs into it.
PYTHON ?= python3
VENV ?= .venv
# The pinned CPU-friendly build; set TORCH=torch (or a CUDA wheel of your choice) to use another.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PROMPTS ?= "a large red circle above a small blue square" \
	"two small yellow triangles, on a pink background" \
	"a large green ring to the left of a small orange diamond"

.PHONY: demo docs test quality format clean

$(VENV)/.base: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install -q -e ".[demo,train,dev]"
	touch $@

demo: $(VENV)/.base
	$(BIN)/gspn2 generate --compare --out outputs $(PROMPTS)

# One process a core, one thread each: torch's threads would otherwise fight one another.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

docs: $(VENV)/.base
	$(BIN)/python -m pip install -q -e ".[docs]"
	$(BIN)/mkdocs build --strict

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
