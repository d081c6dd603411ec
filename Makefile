# Each target makes what it needs, .venv first. PYTHON=... and JOBS=... can be given.

# The first that runs and is new enough; a name on the path alone need not mean that.
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13 python3; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	{ command -v $$each; break; }; done)
JOBS ?= 3  # on two cores: many tests wait for a process or a server
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
INSTALL := $(PIP) install --constraint constraints.txt --editable
INPUTS := pyproject.toml constraints.txt

.PHONY: run help test test-others test-part test-newest-aiohttp soak check lint types layers format bench clean
.DELETE_ON_ERROR:

run: $(VENV)/for-run  ## a server, three nodes and a day of real flights; Ctrl-C ends it
	@$(BIN)/forebay dev

help:  ## what there is to make
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "%-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: $(VENV)/for-test  ## all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# What differs most between versions of Python: tasks and cancellation, annotations, encoding.
PART := tests/schemas tests/nodes/cache tests/nodes/values tests/nodes/test_lifespan.py tests/nodes/test_node.py \
	tests/nodes/test_declarations.py tests/coordinator/test_link.py tests/coordinator/test_log.py
OTHER_PYTHONS := 3.12 3.13

test-others:  ## a part of the tests, on each other Python that is supported and is here
	@for version in $(OTHER_PYTHONS); do \
		python=$$(command -v python$$version); \
		$${python:-false} -c '' 2>/dev/null || python=$$(pyenv prefix $$version 2>/dev/null)/bin/python$$version; \
		if $$python -c '' 2>/dev/null; then \
			$(MAKE) --no-print-directory test-part VENV=.venv-$$version PYTHON=$$python || exit 1; \
		else \
			echo "Python $$version is not here: not tested"; \
		fi; \
	done

test-part: $(VENV)/for-test  ## the tests that test-others runs, on this Python
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q -m "not slow" --ignore tests/nodes/cache/test_fence.py $(PART)

NEWEST_AIOHTTP := .venv-newest-aiohttp

test-newest-aiohttp:  ## the tests of HTTP with the newest aiohttp, in a venv of its own
	$(MAKE) --no-print-directory VENV=$(NEWEST_AIOHTTP) $(NEWEST_AIOHTTP)/for-test
	$(NEWEST_AIOHTTP)/bin/python -m pip --disable-pip-version-check --no-input -qq install --upgrade aiohttp
	$(NEWEST_AIOHTTP)/bin/python -m pytest -n $(JOBS) -q tests/nodes/web

SOAK_SECONDS ?= 120

soak: $(VENV)/for-test  ## faults for minutes, with figures: is every node current, does every event arrive?
	cd tests && ../$(BIN)/python -m faults.coherence --seconds $(SOAK_SECONDS)
	cd tests && ../$(BIN)/python -m faults.outage --seconds 60
	cd tests && ../$(BIN)/python -m faults.flood --seconds 30
	cd tests && ../$(BIN)/python -m faults.flood --seconds 30 --lease
	cd tests && ../$(BIN)/python -m faults.lock_run --level replicated --sections 1000 --rounds 2
	cd tests && ../$(BIN)/python -m faults.lock_run --level fast --sections 1000 --rounds 2
	cd tests && ../$(BIN)/python -m faults.delivery --events 50000

check: lint types layers  ## everything but the tests

lint: $(VENV)/for-dev  ## formatted, and without findings of ruff
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# mypy names modules after directories: let it see the root under the name of the package.
types: $(VENV)/for-dev $(VENV)/src/forebay  ## mypy --strict
	cd $(VENV)/src && ../bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
		-p forebay.schemas -p forebay.coordinator -p forebay.nodes -m forebay

layers: $(VENV)/for-dev  ## imports point down: schemas <- coordinator <- nodes
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(VENV)/for-dev  ## format, and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/for-test  ## compared with peers, in one run; each file is a program with options
	@for each in tests/benchmarks/bench_*.py; do $(BIN)/python $$each || exit 1; done

clean:  ## remove what was made, .venv too
	rm -rf $(VENV) .venv-3.* $(NEWEST_AIOHTTP) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/src/forebay:
	@mkdir -p $(@D) && ln -sfn ../.. $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: apt-get install python3.11-venv" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV)

# What is needed to look at it is less than what is needed to test it, and there sooner.
$(VENV)/for-run: $(INPUTS) | $(VENV)/bin/python
	@echo "installing into $(VENV) ..."
	@$(INSTALL) '.[embedded,cli,speed,sql]'
	@touch $@

$(VENV)/for-test: $(INPUTS) | $(VENV)/bin/python
	@echo "installing into $(VENV) ..."
	@$(INSTALL) '.[test]'
	@touch $@ $(VENV)/for-run

$(VENV)/for-dev: $(INPUTS) | $(VENV)/bin/python
	@echo "installing into $(VENV) ..."
	@$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/for-test $(VENV)/for-run
