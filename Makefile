# On a machine with git, make and some Python >= 3.12: `make demo` or `make test`, nothing before.

PYTHON ?=
PY := .venv/bin/python

.PHONY: help demo test test-compile lint docs

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed  ## train and compare a few mechanisms on this machine, in minutes
	$(PY) -m experiments.demo

# Two workers share the cores: more threads in each would only wait for one another.
test: export OMP_NUM_THREADS := 1
test: export OPENBLAS_NUM_THREADS := 1
test: export XLA_FLAGS := --xla_cpu_multi_thread_eigen=false $(XLA_FLAGS)
test: .venv/installed  ## run all tests; ARGS="tests/cli_test.py -k help" runs a few
	$(PY) -m pytest -n 2 $(ARGS)

# No accelerator is looked for, and two workers may load the compiler for TPU at once.
test-compile: export JAX_PLATFORMS := cpu
test-compile: export TPU_SKIP_MDS_QUERY := 1
test-compile: export ALLOW_MULTIPLE_LIBTPU_LOAD := 1
test-compile: .venv-compile/installed  ## compile kernels and steps for TPU and H100, here; ARGS as above
	.venv-compile/bin/python -m pytest -n 2 $(or $(ARGS),compile_tests)

lint: .venv/installed  ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

docs: .venv/installed  ## write the pages that are made from the records anew
	$(PY) -m attnjax.cli papers --markdown > .venv/catalogue.md
	mv .venv/catalogue.md docs/catalogue.md
	$(PY) -m attnjax.parallel.matrix > .venv/context_parallelism.md
	mv .venv/context_parallelism.md docs/context_parallelism.md

# The compilers for TPU and H100 stay out of .venv: where they are, JAX looks for the devices.
.venv/installed: extras := test
.venv-compile/installed: extras := test,plan

# Installs again when setup.py or constraints.txt has changed, else not.
.venv/installed .venv-compile/installed: setup.py constraints.txt
	python=$$(PYTHON="$(PYTHON)" sh tools/find_python.sh) && "$$python" -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(extras)]'
	touch $@
