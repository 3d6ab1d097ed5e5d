# `make demo` prunes the embedded LLaMA; `make test` runs all tests. Both make their environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
FAMILIES = $(addprefix -e ,$(wildcard plugins/apt-*))  # as anybody's packages
OLDEST = transformers==4.57.1

.PHONY: demo test lint check template matrix clean

demo: $(VENV)/.runtime
	$(BIN)/apt prune --adapter llama --eval builtin --output out/llama-2of4 --overwrite

test: $(VENV)/.development
	$(BIN)/python -m pytest

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

# A package made from the template, beside a wheel, in an environment of its own.
template: $(VENV)/.development
	.ci/template $(BIN)

# The tests on the oldest and the newest transformers of the declared range.
matrix: test
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet -e '.[test]' '$(OLDEST)'
	$(VENV)-oldest/bin/python -m pytest tests

$(VENV)/.runtime: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet .
	touch $@

$(VENV)/.development: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[dev]' $(FAMILIES)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest out dist
