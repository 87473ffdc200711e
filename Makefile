# `make train` and `make test` are all that a new user needs. See README.md.

PYTHON ?= python3
VENV ?= .venv
VENV_MPICH ?= .venv-mpich
# More arguments for `hpctrain run`, for example ARGS="--set train.steps=20".
ARGS ?=
# One rank a core, at least two.
NP ?= $(shell $(PYTHON) -c "import os; print(max(2, len(os.sched_getaffinity(0))))")
# Numbers of ranks that tests run on, with Open MPI and with MPICH.
TEST_RANKS ?= 2 3 4
TEST_RANKS_MPICH ?= $(TEST_RANKS)
# Which of these tests run with MPICH.
TEST_PATHS_MPICH ?= tests
# How many tests run at a time that mpiexec does not start: in one process, or starting programs.
AT_ONCE ?= -n 2
PIP = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Open MPI refuses to run as root, as one is in a container, and to start more ranks than there
# are cores. osc=^ucx silences a warning of the PyPI wheel about networks that it was not built for.
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export OMPI_MCA_osc = ^ucx
export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe

.PHONY: train test test-openmpi test-mpich test-slow lint clean

train: $(VENV)/.train
	$(VENV)/bin/mpirun -n $(NP) $(VENV)/bin/hpctrain run jobs/stdlib_lm.toml $(ARGS)

test: test-openmpi test-mpich lint

# Stamps keep a second call from touching the network.
$(VENV)/.train: setup.cfg pyproject.toml constraints.txt
	@echo "installing into $(VENV) (torch is about 200 MB), a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) --editable '.[mpi,report,jobs]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(VENV)/bin/python $(PIP) --editable '.[mpi,report,jobs,test,lint]'
	touch $@

# MPICH alone; all else is found in the other environment.
$(VENV_MPICH)/.test: $(VENV)/.test
	$(PYTHON) -m venv --clear $(VENV_MPICH)
	$(VENV_MPICH)/bin/python $(PIP) mpich
	echo "import site; site.addsitedir('$$(echo $(abspath $(VENV))/lib/python3*/site-packages)')" \
	  >"$$(echo $(VENV_MPICH)/lib/python3*/site-packages)/others.pth"
	touch $@

test-openmpi: $(VENV)/.test
	$(VENV)/bin/python -m pytest $(AT_ONCE) -m "not mpi and not slow and not alone"
	$(VENV)/bin/python -m pytest -m "alone and not slow"
	for n in $(TEST_RANKS); do \
	  $(VENV)/bin/mpiexec -n $$n $(VENV)/bin/python -m pytest --quiet --with-mpi -m "mpi and not slow" || exit 1; \
	done
	for n in 1 5 6; do \
	  $(VENV)/bin/mpiexec -n $$n $(VENV)/bin/python -m pytest --quiet --with-mpi tests/comm/test_reduce.py || exit 1; \
	done

test-mpich: $(VENV_MPICH)/.test
	$(VENV_MPICH)/bin/python -m pytest $(AT_ONCE) -m "launch and not slow and not any_mpi and not alone"
	$(VENV_MPICH)/bin/python -m pytest -m "alone and not slow and not any_mpi"
	for n in $(TEST_RANKS_MPICH); do \
	  $(VENV_MPICH)/bin/mpiexec -n $$n $(VENV_MPICH)/bin/python -m pytest --quiet --with-mpi -m "mpi and not slow" $(TEST_PATHS_MPICH) || exit 1; \
	done
	for n in 1 5 6; do \
	  $(VENV_MPICH)/bin/mpiexec -n $$n $(VENV_MPICH)/bin/python -m pytest --quiet --with-mpi tests/comm/test_reduce.py || exit 1; \
	done

test-slow: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m "slow and not mpi"
	$(VENV)/bin/mpiexec -n 3 $(VENV)/bin/python -m pytest --quiet --with-mpi -m "mpi and slow"

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) $(VENV_MPICH) build *.egg-info
