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

quickstart/build/.made: $(VENV)/.installed quickstart/tiny.py
	$(VENV)/bin/python -m quickstart.tiny quickstart/build
	touch $@

# Both stages and the evaluation, with and without the mapping, on tiny random models.
quickstart: export PATH := $(abspath $(VENV))/bin:$(PATH)
quickstart: quickstart/build/.made
	deepspeed --num_accelerators 1 run_training.py --deepspeed --config quickstart/mapping.yaml
	deepspeed --num_accelerators 1 run_training.py --deepspeed --config quickstart/augmentation.yaml
	python run_evaluation.py --config quickstart/evaluation.yaml --init_checkpoint outputs/quickstart/augmentation
	python run_evaluation.py --config quickstart/evaluation.yaml --baseline

clean:
	rm -rf quickstart/build outputs/quickstart results/quickstart results/quickstart-baseline
