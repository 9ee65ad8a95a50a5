# Needs Python 3.10 or newer, and make. Everything is installed into .venv; nothing outside it is touched.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TASK ?= synthetic-a
EPOCHS ?=
BIN := .venv/bin
# Another TORCH makes the environment anew.
READY := .venv/ready-$(subst /,_,$(subst =,-,$(TORCH)))

.PHONY: demo test test-slow lint types bench clean help

help:
	@echo "make demo [TASK=synthetic-a|digits] [EPOCHS=80]   train with DALS, DALS-Fast, DALS-Acc, SGD, AdamW"
	@echo "make test        lint, types, tests;  make test-slow  the long training runs too"
	@echo "make bench       step time on this machine, GPU or CPU;  python -m bench lists all measurements"

# torch comes first and pinned: another package that asks for it must find it installed.
$(READY): Makefile requirements-dev.txt pyproject.toml setup.cfg
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: $(READY)
	$(BIN)/python -m bench demo --task $(TASK) $(if $(EPOCHS),--epochs $(EPOCHS))

test: lint types
	$(BIN)/python -m pytest

test-slow: lint types
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m bench micro

clean:
	rm -rf .venv out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
