# Every target sets itself up: a virtual environment from pyproject.toml and the pinned constraints.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test slow check assets clean

demo: $(VENV)/.ready
	$(RUN) -m distill prune --task coding --out runs/demo

# the tests' models are tiny: a second thread only makes them wait for each other, a second process does not; what a file sets up once stays there
TESTS := -q --numprocesses auto --maxprocesses 4 --dist loadfile
test slow check: export OMP_NUM_THREADS = 1

test: $(VENV)/.ready
	$(RUN) -m pytest $(TESTS)

slow: $(VENV)/.ready
	$(RUN) -m pytest $(TESTS) -m slow

check: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy distill evals backdoor graphs
	$(RUN) -m pytest $(TESTS)

assets: $(VENV)/.ready
	$(RUN) -m distill.assets

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed: make PYTHON=python3.12') if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info runs
