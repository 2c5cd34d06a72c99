# `make demo` and `make test` are all a newcomer needs; `make help` lists the rest.
#
# Variables, given as `make test PYTHON=python3.12`:
#   PYTHON       the Python that makes the environment (default: the first one found that is 3.11 or later)
#   VENV         the folder of the environment (default: .venv)
#   CONSTRAINTS  a pip constraints file, to test against chosen versions
#   JOBS         processes the tests run in (default: 2)
#   KIND, NAME   of a new part, and of the part to check; ROOM: the room of a new compressor
#   *_FLAGS      DEMO_FLAGS, TEST_FLAGS, MUTATION_FLAGS, BENCHMARK_FLAGS: of the program of a target

PYTHON ?=
VENV ?= .venv
CONSTRAINTS ?=
JOBS ?= 2
KIND ?=
NAME ?=
ROOM ?=
DEMO_FLAGS ?=
TEST_FLAGS ?=
MUTATION_FLAGS ?=
BENCHMARK_FLAGS ?=

# Eight virtual devices where there is only a CPU. XLA's thread pool must be larger than their
# number or collectives can stall on machines with few cores.
PJRT_NPROC ?= 16
ifeq (,$(findstring xla_force_host_platform_device_count,$(XLA_FLAGS)))
    override XLA_FLAGS += --xla_force_host_platform_device_count=8
endif
export PJRT_NPROC XLA_FLAGS

# A name on PATH proves nothing (a version manager's shim may fail, Debian splits off ensurepip),
# so every candidate is run before it is taken.
VERSIONS := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
CANDIDATES = $(or $(PYTHON),python3 python python3.11 python3.12 python3.13 python3.14 \
    $(wildcard $(VERSIONS)/3.1[1-9]*/bin/python3))
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
NO_PYTHON = ef-optax needs Python 3.11 or later (with venv); \
    none of these is one: $(strip $(CANDIDATES)). Install one, or name it: make PYTHON=/path/to/python3

RUN := $(VENV)/bin/python

# The name of the stamp holds a checksum of all that decides what is installed. An environment that
# was made by another Python than the requested one is made again.
STAMP := $(VENV)/installed-$(firstword $(shell cat pyproject.toml $(CONSTRAINTS) | cksum))
IDENTITY := import sys; print(sys.base_prefix, sys.version_info[:2])
ifneq (,$(PYTHON))
ifneq ($(shell "$(PYTHON)" -c '$(IDENTITY)' 2>/dev/null || true),$(shell $(RUN) -c '$(IDENTITY)' 2>/dev/null || true))
    ANEW := FORCE
endif
endif

.DEFAULT_GOAL := help
.PHONY: FORCE help install demo test test-slow mutations notebooks benchmark new check tables docs wheel \
    lint format types clean

help: ## list the targets
	@echo "usage: make TARGET"; echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
	    printf '  %-12s %s\n' "$$name" "$$text"; \
	done

install: $(STAMP) ## make the environment in .venv (every other target does it when needed)

$(STAMP): $(ANEW)
	@found=; for python in $(CANDIDATES); do \
	    if "$$python" -c '$(USABLE)' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "$(NO_PYTHON)" >&2; exit 1; fi; \
	if [ -n "$(ANEW)" ] || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$found ($$("$$found" --version))"; \
	    "$$found" -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "Installing ef-optax and what its tests and experiments need into $(VENV) (some minutes)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev]'
	@rm -f $(VENV)/installed-*
	@touch $@

demo: $(STAMP) ## train on real digits, with and without error feedback (results: runs/demo)
	$(RUN) -m experiments.train --flagfile=experiments/presets/demo.flags $(DEMO_FLAGS)

test: $(STAMP) ## run the tests and the examples of the docstrings
	$(RUN) -m pytest -n $(JOBS) --dist worksteal $(TEST_FLAGS)

test-slow: $(STAMP) ## run the tests that take long, and second looks at what others test
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -m slow $(TEST_FLAGS)

mutations: $(STAMP) ## apply faults to a copy of the library and show which test notices each (an hour)
	$(RUN) -m tests.mutations $(MUTATION_FLAGS)

notebooks: $(STAMP) ## execute the notebooks and the long pages of the documentation
	$(RUN) -m pytest -n $(JOBS) -m notebooks $(TEST_FLAGS)

benchmark: $(STAMP) ## measure codecs and training steps against their floors
	$(RUN) -m benchmarks $(BENCHMARK_FLAGS)

new: $(STAMP) ## begin a part: make new KIND=compressor NAME=my_compressor (CONTRIBUTING.md)
	@$(RUN) -m tools.new --kind=$(KIND) --name=$(NAME) $(if $(ROOM),--room=$(ROOM))

check: $(STAMP) ## run all that concerns one part: make check NAME=my_compressor
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)
	$(RUN) -m pytest -n $(JOBS) -m "not notebooks" -k "$(NAME) or complete or fresh" $(TEST_FLAGS)

tables: $(STAMP) ## write the table of all compressors (docs/compressors.md) again
	$(RUN) -m docs.tables

docs: $(STAMP) ## build the reference site in build/site (warnings are errors)
	$(RUN) -m sphinx --quiet --fail-on-warning --keep-going -c docs -d build/doctrees . build/site
	@echo "The site: build/site/index.html"

wheel: $(STAMP) ## build the wheel, and try it with nothing but what it requires
	rm -rf build/lib build/wheel build/bare
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(RUN) -m venv build/bare
	build/bare/bin/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) build/wheel/*.whl
	cd build && bare/bin/python -I -W error ../.ci/bare.py

lint: $(STAMP) ## check style and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(STAMP) ## put code into the house format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(STAMP) ## check the types of the library
	$(RUN) -m pyright --pythonpath $(RUN)

clean: ## remove environments and caches; results in runs/ stay
	rm -rf $(VENV) .venv-* build ef_optax.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
