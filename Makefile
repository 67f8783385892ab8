# Everything lives in .venv; an install is repeated only when its inputs change.
#
#   make demo    install, then text from the bundled demo model with its statistics
#   make test    install with the dev extra, then the default test suite
#   make check   lint, types and tests (what .ci/run does)
#   make clients the clients' own code against our server, each in an environment of its own
#   make fuzz    each fuzz target for FUZZ_SECONDS (60)
#
# PYTHON=...       an interpreter of your choice (3.11 to 3.13, with the venv module)
# TORCH_INDEX=...  PyTorch's CPU wheel index, used for that one package where there is no NVIDIA
#                  driver; without it the CPU machine takes what the default index offers
# PROMPT="..."     what `make demo` continues

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
# By running each: a name on the PATH may be a shim for a version that is not there.
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3; do \
	"$$name" -c '$(USABLE)' >/dev/null 2>&1 && echo "$$name" && break; done)
TORCH_INDEX ?=
PROMPT ?= My dear Jane, I have

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --quiet --progress-bar off
DRIVER := $(shell { command -v nvidia-smi || ls -d /proc/driver/nvidia; } 2>/dev/null | head -n 1)
CONSTRAINTS := $(if $(DRIVER),,--constraint constraints-cpu.txt)

NATIVE := CMakeLists.txt $(wildcard csrc/*)

.PHONY: help demo test lint types check fuzz clients clean

help:
	@sed -n '3,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	$(BIN)/halfbyte run demo --raw "$(PROMPT)" --temperature 0.7 --seed 3 --max-tokens 80 --stats

# A process for each processor with one thread: the tests' matrices are small, and threads that wait
# for a busy core cost tenfold. Tests of a file stay together and share what they set up.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test

FUZZ_SECONDS ?= 60
fuzz: $(VENV)/.installed-dev
	@$(INSTALL) $(CONSTRAINTS) --editable ".[dev,fuzz]"
	@for target in fuzz/targets/[!_]*.py; do \
		$(BIN)/python fuzz/run.py "$$(basename "$$target" .py)" \
			-max_total_time=$(FUZZ_SECONDS) || exit 1; done

CLIENTS := $(patsubst tests/clients/%.txt,.clients/%/.installed,$(wildcard tests/clients/*.txt))
clients: $(VENV)/.installed-dev $(CLIENTS)
	$(BIN)/python -m pytest -m clients tests/test_serve_clients.py -rA

.clients/%/.installed: tests/clients/%.txt
	@"$(PYTHON)" -m venv .clients/$*
	@.clients/$*/bin/python -m pip install --quiet --progress-bar off --requirement $<
	@touch $@

clean:
	rm -rf .clients $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@python="$(PYTHON)"; if ! "$${python:-false}" -c '$(USABLE)' 2>/dev/null; then \
		echo "make: $${python:-nothing on the PATH} is no Python 3.11 to 3.13 with venv" >&2; \
		echo "  hint: install python3 and python3-venv, or make PYTHON=/path/to/python" >&2; \
		exit 1; fi; \
	echo "Creating $(VENV) with $$("$$python" --version) ($$python)"; \
	"$$python" -m venv $(VENV)
	@touch $@

# PyTorch first and alone on a machine without a driver: one exact version, from its own index if
# one is named. With a driver the normal build comes in as a dependency.
$(VENV)/.torch: $(VENV)/.created constraints-cpu.txt
ifeq ($(DRIVER),)
	@echo "Installing PyTorch for the CPU (no NVIDIA driver found)"
	@$(INSTALL) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") --requirement constraints-cpu.txt
endif
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	@echo "Installing halfbyte"
	@$(INSTALL) $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml $(NATIVE)
	@echo "Installing halfbyte with what its tests need"
	@$(INSTALL) $(CONSTRAINTS) --editable ".[dev]"
	@touch $(VENV)/.installed $@
