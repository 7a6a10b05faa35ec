# Everything from a fresh clone on Debian or Ubuntu; `make help` lists the targets.
# `make demo PYTHON=python3.12` builds the environment with another interpreter than python3.
VENV := .venv
BIN := $(VENV)/bin
# Written last: an interrupted installation is done again, a finished one never.
INSTALLED := $(VENV)/.installed

# Test processes: one per core, eight at most; each computes on one thread.
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
# Options for pytest, as in `make test PYTEST="-k resume"`.
PYTEST ?=

.DEFAULT_GOAL := help
.PHONY: demo test pytest lowest lint format hooks setup clean help

demo: $(INSTALLED)  ## train a small Vision Longformer on the bundled digits, print its accuracy
	$(BIN)/python train.py

test: lint pytest  ## run the linters, then all tests

pytest: $(INSTALLED)  ## run the tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST)

lowest:  ## test attention, models and a compiled step with the lowest versions that requirements.txt allows
	tools/lowest_versions.sh .venv-lowest $(PYTEST)

lint: $(INSTALLED)  ## check style, types and who imports whom
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

format: $(INSTALLED)  ## format the code and apply the fixes of ruff
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

hooks: $(INSTALLED)  ## run the linters before every commit
	$(BIN)/python -m pre_commit install

setup: $(INSTALLED)  ## install everything, run nothing

clean:  ## remove the virtual environment and all caches; runs/ stays
	rm -rf $(VENV) .venv-lowest .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@sed -n 's/^\([a-z]*\):[^#]*##  *\(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(INSTALLED): requirements.txt requirements-dev.txt tools/setup.sh
	tools/setup.sh $(VENV)
	@touch $@
