# On a machine with git, make and some Python >= 3.12: `make demo` or `make test`, nothing before.

PYTHON ?=
PY := .venv/bin/python

.PHONY: help demo test lint docs

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed  ## train and compare a few mechanisms on this machine, in minutes
	$(PY) -m experiments.demo

# Two workers share the cores: more threads in each would only wait for one another.
test: export OMP_NUM_THREADS := 1
test: export OPENBLAS_NUM_THREADS := 1
test: export XLA_FLAGS := --xla_cpu_multi_thread_eigen=false $(XLA_FLAGS)
test: .venv/installed  ## run all tests; ARGS="tests/cli_test.py -k help" runs a few
	$(PY) -m pytest -n 2 $(ARGS)

lint: .venv/installed  ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

docs: .venv/installed  ## write the pages that are made from the records anew
	$(PY) -m attnjax.cli papers --markdown > .venv/catalogue.md
	mv .venv/catalogue.md docs/catalogue.md
	$(PY) -m attnjax.parallel.matrix > .venv/context_parallelism.md
	mv .venv/context_parallelism.md docs/context_parallelism.md

# Installs again when setup.py or constraints.txt has changed, else not.
.venv/installed: setup.py constraints.txt
	python=$$(PYTHON="$(PYTHON)" sh tools/find_python.sh) && "$$python" -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
