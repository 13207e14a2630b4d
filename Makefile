# From a bare clone: `make test`, `make quickstart`. Each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv

.PHONY: test lint quickstart clean
.DELETE_ON_ERROR:

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .

test: lint
	$(VENV)/bin/python -m pytest -m "not slow"
