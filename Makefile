# From a bare clone: `make test`, `make quickstart`. Each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv

.PHONY: test lint quickstart benchmark clean
.DELETE_ON_ERROR:

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt requirements-lm_eval.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .

test: lint
	$(VENV)/bin/python -m pytest -m "not slow" -n logical --maxprocesses 4 --dist worksteal

quickstart: $(VENV)/.installed
	$(VENV)/bin/python -m quickstart

# Which models and data: make benchmark BENCHMARK="--llm_path LLM --mt_path MT --data_dir datas_questions"
benchmark: $(VENV)/.installed-dev
	$(VENV)/bin/python -m benchmarks.table $(BENCHMARK)
	$(VENV)/bin/python -m benchmarks.growth

clean:
	rm -rf quickstart/build quickstart/results.html quickstart/results.json outputs/quickstart results/quickstart*
