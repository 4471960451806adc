# Every target that runs something long does it through infra/guarded.sh: whatever happens to make, nothing of it stays.
SHELL := /bin/bash
.DEFAULT_GOAL := help

STORE ?= ./artifacts
ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadgroup

BIN := .venv/bin
GUARDED := GUARD_CALLER=$$PPID infra/guarded.sh
# All state of a run lies in the store (beside it for a remote one); the user's own servers and profiles are not used.
STATE := $(if $(findstring ://,$(STORE)),./artifacts,$(STORE))
LOCAL := env -u PREFECT_API_URL -u PREFECT_API_KEY -u PREFECT_PROFILE -u MLFLOW_TRACKING_URI \
	PREFECT_HOME="$$(realpath -m "$(STATE)")/prefect"
PYTEST := env OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help setup lock demo cats-64 check test test-slow bench

help: ## list the targets (the default)
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  STORE=$(STORE)  where artifacts and all local state go"
	@echo "  ARGS=...           more arguments for demo and cats-64: make demo ARGS='--set training.num_images=1000'"
	@echo "  PYTEST_ARGS=...    arguments for the tests: make test PYTEST_ARGS='-k shards'"

setup: ## create the environment of requirements.lock in .venv (8 GB, 3 to 4 minutes; at once when it is there)
	@$(GUARDED) infra/setup.sh

lock: ## compile requirements.lock from pyproject.toml (needs uv)
	@command -v uv >/dev/null || { echo "make lock needs uv (any recent version) on the PATH"; exit 1; }
	UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile --quiet --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url --extra dev \
		pyproject.toml -o requirements.lock

demo cats-64: setup
	@$(GUARDED) $(LOCAL) $(BIN)/ldm reproduce $@ --store "$(STORE)" $(ARGS)

demo: ## run the whole pipeline on real pictures at 32x32: 1,300 to 2,200 CPU-seconds
cats-64: ## the same at 64x64: 3,500 CPU-seconds

check: setup ## formatting, lint, types, the law of imports, dependencies, spelling
	@$(GUARDED) $(BIN)/ruff format --check .
	@$(GUARDED) $(BIN)/ruff check .
	@$(GUARDED) $(BIN)/basedpyright --pythonpath $(BIN)/python
	@$(GUARDED) $(BIN)/lint-imports --no-cache --no-logo
	@$(GUARDED) $(BIN)/deptry .
	@$(GUARDED) $(BIN)/codespell

test: setup ## the fast tests
	@$(GUARDED) $(PYTEST) $(PYTEST_ARGS)

test-slow: setup ## the slow tests
	@$(GUARDED) $(PYTEST) -m slow $(PYTEST_ARGS)

bench: setup ## the benchmarks, one at a time
	@$(GUARDED) $(PYTEST) -m benchmark -s tests/benchmarks
