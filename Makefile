# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes the virtual environment if there
# is none and installs what it needs; a second run installs nothing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

# A stamp holds the folder that it was made in: an environment that was copied or moved is installed again.
stale = $(if $(filter $(CURDIR),$(shell cat $(VENV)/.installed-$(1) 2>/dev/null)),,FORCE)

.PHONY: help demo test lint format clean FORCE

help:
	@echo "make demo    plan, rewrite and train a 12-layer GPT-2 within half of its activation memory"
	@echo "make test    run the tests"
	@echo "make lint    ruff and pyright"
	@echo "make format  ruff's formatter"
	@echo "make clean   remove the virtual environment and what tools left behind"

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo_gpt2.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed-demo: EXTRAS = cli,examples
$(VENV)/.installed-test: EXTRAS = test

$(VENV)/.installed-demo: pyproject.toml planner/_version.py $(call stale,demo)
	$(install)

$(VENV)/.installed-test: pyproject.toml planner/_version.py $(call stale,test)
	$(install)

# An environment without a working pip (half-made, or its interpreter gone) is made anew rather than trusted.
define install
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$(EXTRAS)]'
	@echo "$(CURDIR)" > $@
endef

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

FORCE:
