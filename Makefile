# `make help` lists the targets. The environment is made in .venv/, everything else lands in $HEADRACE_HOME (default .headrace/).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
LINTERS := lint-types lint-format lint-imports lint-sql
.PHONY: help setup demo lint $(LINTERS) machine-code test faults sanitize quality clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Python 3.11 or 3.12; `make demo PYTHON=/path/to/python3.12` picks one
PYTHON := python3 python3.12 python3.11
USABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
FREE_GB := 4
WORKERS := 2

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make the environment in .venv/ (again when pyproject.toml or constraints.txt change)

$(READY): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c '$(USABLE)' 2>/dev/null; then \
		for candidate in $(PYTHON); do \
			if "$$candidate" -c '$(USABLE)' 2>/dev/null; then found="$$candidate"; break; fi; \
		done; \
		if [ -z "$${found:-}" ]; then \
			echo "Headrace needs Python 3.11 or 3.12 with its venv module; looked for: $(PYTHON); python3 is $$(python3 -V 2>&1 || true)." >&2; \
			echo "On Debian 12: apt-get install python3 python3-venv. Or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
			exit 2; \
		fi; \
		free_gb=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); \
		if [ "$$free_gb" -lt $(FREE_GB) ]; then \
			echo "The environment needs about $(FREE_GB) GB of disk (8 GB with a CUDA build of torch), $$free_gb GB are free in $$PWD." >&2; \
			exit 2; \
		fi; \
		echo "Setting up $(VENV)/ with $$("$$found" -V) (once; one to four minutes)"; \
		"$$found" -m venv --clear $(VENV); \
	fi
	@$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # pip would do it on one core; a few files are templates and no Python
	@if ! $(BIN)/python -c 'import lightgbm' 2>/dev/null; then \
		$(BIN)/python -c 'import lightgbm' 2>&1 | tail -n 1 >&2 || true; \
		echo "lightgbm does not load; it needs the OpenMP library. On Debian: apt-get install libgomp1, then again." >&2; \
		exit 2; \
	fi
	@touch $@

demo: $(READY) ## land, build features, train, then serve on 127.0.0.1:8000; ONCE=1 exits when all is shown, PORT=8080 moves it
	@$(BIN)/headrace demo $(if $(filter-out 0,$(ONCE)),--once) $(if $(PORT),--port $(PORT))

IN_PARALLEL = $(MAKE) --no-print-directory --jobs $(WORKERS) --output-sync=target

lint: $(READY) ## format, imports between rooms, types, SQL
	@$(IN_PARALLEL) $(LINTERS)

# mypy takes the longest: it begins first
lint-types: $(READY)
	$(BIN)/mypy

lint-format: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-imports: $(READY)
	$(BIN)/lint-imports

lint-sql: $(READY)
	$(BIN)/sqlfluff lint --processes 1 warehouse/models streaming_sql/models

# numba's loops, compiled once: two test workers that begin at one moment would each compile all of them
machine-code: $(READY)
	@$(BIN)/python -c 'import serving.app'

test: $(READY) ## lint, then every test this machine can run; those it cannot name what is missing
	@$(IN_PARALLEL) $(LINTERS) machine-code
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

faults: $(READY) ## kill collector, lander and runner KILLS times each (50), the trainer twice as often; CASES (10000) made-up requests
	HEADRACE_KILLS=$(or $(KILLS),50) $(BIN)/python -m pytest -q tests/faults
	HEADRACE_KILLS=$$((2 * $(or $(KILLS),50))) $(BIN)/python -m pytest -q --timeout 1800 tests/models_ml/trainer/test_kill.py
	HEADRACE_API_CASES=$(or $(CASES),10000) $(BIN)/python -m pytest -q -s --timeout 3600 tests/serving/test_openapi.py

SANITIZED := tests/kernels/test_kernel_window_assembly.py tests/kernels/test_kernel_embedding_lookup.py tests/kernels/test_kernel_top_k.py

sanitize: $(READY) ## compute-sanitizer over the kernels that follow indices, on small cases; says so without a GPU
	@if ! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		echo "No GPU here: there is nothing that compute-sanitizer could watch."; \
	elif ! command -v compute-sanitizer >/dev/null; then \
		echo "compute-sanitizer is not on PATH; it comes with the CUDA toolkit." >&2; exit 2; \
	else \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
			$(BIN)/python -m pytest -q $(SANITIZED) -k "not compiles and not debug"; \
	fi

quality: $(READY) ## the gates of models_ml/quality.json: benchmarks and ranking; hours; ONLY="beauty ranking" picks
	$(BIN)/python -m models_ml.quality $(ONLY)
	$(if $(ONLY),,for form in onnx torchscript torch; do $(BIN)/headrace export l2 --format $$form --requests 10000; done)

clean: ## remove the environment and caches; $HEADRACE_HOME stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache target logs *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
