# Everything a fresh machine needs is Python 3.11 or newer and make: the first target that runs sets up .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
DEMO ?= pipelines/demo/meta_dmoe.yaml
DEMO_SERVE ?= pipelines/demo/serve.yaml
SOURCES := moe workers orchestrator serve tests benchmarks

# DeepSpeed must not compile its extensions while it is installed; nothing reports usage to anybody.
export DS_BUILD_OPS := 0
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## show this list
	@echo "make TARGET, where TARGET is one of:"
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  %-12s %s\n' "$$name" "$$text"; done
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) PYTEST_ARGS='-k name'"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 demo" >&2; exit 5; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "No virtual environment could be made. On Debian and Ubuntu: apt install python3-venv" >&2; exit 5; }
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo,search,text,graph,dev]'
	@touch $@

.PHONY: install
install: $(STAMP) ## make .venv with the tested versions (done once, by the other targets too)

.PHONY: demo
demo: $(STAMP) ## run Meta-DMoE end to end on real data that ships with the packages (minutes on 2 cores)
	@$(BIN)/moepipe submit $(DEMO)

.PHONY: demo-serve
demo-serve: $(STAMP) ## train a small student, serve it, adapt it to angles it never saw, accuracy before and after (minutes)
	@$(BIN)/moepipe submit $(DEMO_SERVE)
	@$(BIN)/python -m serve.demo

.PHONY: test
test: $(STAMP) lint types ## all checks: ruff, format, mypy, import rules, pytest
	$(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: lint
lint: $(STAMP) ## ruff, formatting and the rules about who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

.PHONY: format
format: $(STAMP) ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: types
types: $(STAMP) ## mypy --strict on the four packages
	$(BIN)/mypy

.PHONY: bench
bench: $(STAMP) ## print the table of speed and memory ratios
	$(BIN)/python -m benchmarks

.PHONY: docs-check
docs-check: $(STAMP) ## commands, links and error codes in README.md and docs/ are real
	$(BIN)/python -m pytest tests/test_readme.py tests/test_errors_documented.py tests/test_docs_python.py

.PHONY: ui
ui: $(STAMP) ## open MLflow on the runs in ./.moepipe
	@$(BIN)/moepipe ui

.PHONY: clean
clean: ## remove caches and build products (keeps .venv and .moepipe)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
