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

# Both stages and the evaluation, with and without the mapping, on tiny random models.
quickstart: $(VENV)/.installed
	test -d quickstart/build || $(VENV)/bin/python -m quickstart.tiny quickstart/build
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" deepspeed --num_accelerators 1 run_training.py --deepspeed --config quickstart/mapping.yaml
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" deepspeed --num_accelerators 1 run_training.py --deepspeed --config quickstart/augmentation.yaml
	$(VENV)/bin/python run_evaluation.py --config quickstart/evaluation.yaml --init_checkpoint outputs/quickstart/augmentation
	$(VENV)/bin/python run_evaluation.py --config quickstart/evaluation.yaml --baseline

clean:
	rm -rf quickstart/build outputs/quickstart results/quickstart results/quickstart-baseline
