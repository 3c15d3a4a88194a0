# Short names for the project's commands. Every target makes `.venv` and installs what it needs by itself.
#
#   make demo                     the whole pipeline on real text, about 10 minutes on 2 cores
#   make test                     lint and tests
#   make cache TEACHER=moe16b     stage 1; CORPUS, OUT, ARGS as below
#   make train                    stage 2; CACHE, RECIPE, OUT, ARGS as below

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

TEACHER ?= tiny
CORPUS ?= stdlib
CACHE ?=
RECIPE ?= reverse-calm-tidal
OUT ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo cache train test lint format test-slow tiny bench clean

help:
	@sed -n '3,6s/^# *//p' Makefile

$(INSTALLED): pyproject.toml .constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "tidecache needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12 …" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement .constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .constraints.txt --editable '.[dev]'
	@touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python bench/demo.py $(ARGS)

cache: $(INSTALLED)
	$(BIN)/tidecache teacher capture --teacher $(TEACHER) --corpus $(CORPUS) $(if $(OUT),--out $(OUT)) $(ARGS)

train: $(INSTALLED)
	$(BIN)/tidecache student train --recipe $(RECIPE) $(if $(CACHE),--cache $(CACHE)) $(if $(OUT),--out $(OUT)) $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow --timeout=1500

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tiny: $(INSTALLED)
	$(BIN)/python bench/tiny.py build $(or $(OUT),runs/tiny)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
