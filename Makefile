# The commands of this project. `make` alone lists them.
#
# Everything lives in .venv (Python 3.11 or later; choose with PYTHON=...) and in .mesh.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

VENV := .venv
# Foreign clients (tritonclient, KServe's) live apart: what they pin is not what we pin.
CLIENTS := .venv-clients
# And so do foreign servers that models run in.
MLSERVER := .venv-mlserver
TRITON := .venv-triton
BIN := $(VENV)/bin
SAMPLES_DIR := .mesh/samples
SAMPLES ?= 300
# Each instance's memory for models: about half of the samples fit into two of these.
CAPACITY ?= 24MiB
# More flags for `make up` (UP_FLAGS="--grpc-port 9033") and `make test` (TEST_FLAGS="-k wire").
UP_FLAGS ?=
TEST_FLAGS ?=

.PHONY: help
help: ## list these commands
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.run-installed ## make .venv and install the project into it

.PHONY: up
up: setup samples ## a mesh on this machine with a few hundred sample models, until Ctrl-C
	@exec $(BIN)/mesh up --models $(SAMPLES_DIR) --capacity $(CAPACITY) $(UP_FLAGS)

.PHONY: samples
samples: setup ## make the sample models (.mesh/samples)
	@test -d $(SAMPLES_DIR) || echo "making $(SAMPLES) sample models (a minute or two, once) ..."
	@$(BIN)/python -m mesh.samples $(SAMPLES_DIR) --count $(SAMPLES) >/dev/null

.PHONY: test
test: $(VENV)/.dev-installed $(CLIENTS)/.installed $(MLSERVER)/.installed $(TRITON)/.installed ## all tests, with what they need installed first
	@$(BIN)/python -m pytest $(TEST_FLAGS)

.PHONY: test-unit
test-unit: $(VENV)/.dev-installed ## the quick tests: no etcd, no processes of a mesh
	@$(BIN)/python -m pytest -m "not etcd and not e2e and not client" $(TEST_FLAGS)

.PHONY: lint
lint: $(VENV)/.dev-installed ## ruff, formatting, mypy --strict, the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: check
check: lint test ## lint and test: what CI runs

.PHONY: bench
bench: $(VENV)/.bench-installed ## the benchmarks, a table each and JSON in bench/results/local
	@$(BIN)/python -m bench

.PHONY: clean
clean: ## remove .venv, .mesh and what tools left
	rm -rf $(VENV) $(CLIENTS) $(MLSERVER) $(TRITON) .mesh .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis \
		build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the virtual environment ----

$(BIN)/python:
	@found=""; \
	for one in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
		if "$$one" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			found="$$one"; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "error: Python 3.11 or later is needed; name one with: make PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	if ! "$$found" -m venv $(VENV); then \
		rm -rf $(VENV); \
		echo "error: $$found cannot make a virtual environment;" \
			"on Debian and Ubuntu: apt-get install python3-venv" >&2; \
		exit 1; \
	fi

# Made anew when pyproject.toml changed; what is installed already is kept.
$(VENV)/.run-installed: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[up,sklearn,samples]'
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.run-installed
	@echo "installing what tests and lint need ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[up,sklearn,samples,dev]'
	@touch $@

# HAProxy and h2load come from the system: apt-get install haproxy nghttp2-client
$(VENV)/.bench-installed: $(VENV)/.dev-installed
	@echo "installing what the benchmarks compare with ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[up,sklearn,samples,dev,bench]'
	@touch $@

# kubernetes 36 checks its arguments' types, and refuses the objects that KServe's client passes.
$(CLIENTS)/.installed: | $(BIN)/python
	@echo "installing foreign clients into $(CLIENTS) ..."
	@rm -rf $(CLIENTS)
	@$(BIN)/python -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check \
		'tritonclient[grpc,http]' kserve 'kubernetes<36'
	@touch $@

$(MLSERVER)/.installed: | $(BIN)/python
	@echo "installing MLServer into $(MLSERVER) ..."
	@rm -rf $(MLSERVER)
	@$(BIN)/python -m venv $(MLSERVER)
	@$(MLSERVER)/bin/python -m pip install --quiet --disable-pip-version-check \
		mlserver mlserver-sklearn
	@touch $@

# 75 MB: a tritonserver with the Python back end, for x86-64 Linux. Of the package itself nothing is
# used, so of what it requires only NumPy is taken (with NumPy 2 its answers are empty). The back
# end's stub must be this Python's.
$(TRITON)/.installed: | $(BIN)/python
	@echo "installing Triton into $(TRITON) ..."
	@rm -rf $(TRITON)
	@$(BIN)/python -m venv $(TRITON)
	@if $(TRITON)/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
		--only-binary :all: nvidia-pytriton==0.7.0 'numpy<2'; then \
		cd $(TRITON)/lib/python3*/site-packages/pytriton/tritonserver && \
		cp python_backend_stubs/$$($(abspath $(TRITON))/bin/python -c \
			'import sys; print("%d.%d" % sys.version_info[:2])')/* backends/python/; \
	else \
		echo "there is none for this machine: its tests are skipped"; \
	fi
	@touch $@
