# make run    the notebook from top to bottom on the embedded model and data_examples; CPU is enough
# make test   every test, on the stack of tests/stacks/$(STACK).txt
# make lint   ruff over module, tests and notebook
# Each sets up all it needs in .venv/$(STACK).
STACK ?= newest
PYTHON ?= python3
VENV := .venv/$(STACK)
PY := $(VENV)/bin/python

# What `make run` changes in the hyperparameter cell: a 135M model wants a higher learning rate than a 7B one, and two
# cores want fewer epochs.
# Any setting can be given by its name in capitals: make run BASE_MODEL=… EPOCHS=1 DATA=my.jsonl RUN_NAME=mine
RUN_DEFAULTS := BASE_MODEL=embedded DATA='data_examples/*.jsonl' RUN_NAME=triage EPOCHS=3 \
  LEARNING_RATE=6e-4 MAX_NEW_TOKENS=32 PUSH_TO_HUB=False
GIVEN = $(filter-out STACK=% PYTHON=%,$(MAKEOVERRIDES))

# make launch   the same on several GPUs
.PHONY: run launch test lint readme clean

run: $(VENV)/ready
	$(PY) tests/run_notebook.py $(RUN_DEFAULTS) $(GIVEN)

# The notebook's cells as a script in one process a GPU: make launch GPUS=2 BASE_MODEL=… DATA=…
launch: $(VENV)/ready
	$(PY) tests/launch.py $(RUN_DEFAULTS) $(GIVEN)

# Two processes of one thread each. The other stacks leave out what tests Python alone at length.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile $(if $(filter newest,$(STACK)),,-m "not slow")

lint: $(VENV)/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(VENV)/ready: requirements.txt tests/requirements.txt tests/stacks/$(STACK).txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check \
	  -r requirements.txt -r tests/requirements.txt -c tests/stacks/$(STACK).txt \
	  $(if $(filter newest,$(STACK)),jupyterlab playwright)
	touch $@

readme: $(VENV)/ready
	$(PY) tests/readme.py content/model_outputs/triage

clean:
	rm -rf .venv content
