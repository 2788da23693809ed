# make run      the notebook from top to bottom on the embedded model and data_examples; CPU is enough
# make test     every test, on the stack of tests/stacks/$(STACK).txt
# make launch   the same on several GPUs
# make lint     ruff over modules, tests and notebook, and mypy over the modules
# Each sets up all it needs in .venv/$(STACK).
STACK ?= newest
PYTHON ?= python3
VENV := .venv/$(STACK)
PY := $(VENV)/bin/python

# What `make run` changes in section 2. Any setting can be given by its name in
# capitals, with any value: make run BASE_MODEL=… EPOCHS=1 DATA='my rows/*.jsonl' RUN_NAME=mine
RUN_DEFAULTS := BASE_MODEL=embedded DATA='data_examples/*.jsonl' RUN_NAME=triage PUSH_TO_HUB=False

.PHONY: run launch test lint readme clean

run: $(VENV)/installed
	$(PY) -m finetune.headless --make $(RUN_DEFAULTS)

# The notebook's cells as a script in one process a GPU: make launch GPUS=2 BASE_MODEL=… DATA=…
launch: $(VENV)/installed
	$(PY) -m finetune.launch --make $(RUN_DEFAULTS)

# Two processes of one thread each, files in their order: reordered, the longest would come last.
# The other stacks leave out what tests Python alone at length.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  $(if $(filter newest,$(STACK)),,-m "not slow")

lint: $(VENV)/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# What a run needs; without compiling all of it in advance it is there in half the time.
PIP = $(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c tests/stacks/$(STACK).txt
$(VENV)/installed: requirements.txt tests/stacks/$(STACK).txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, and $(PYTHON) is {sys.version.split()[0]}: give another as PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt papermill nbconvert ipykernel gguf
	touch $@

# What the tests need besides.
$(VENV)/ready: $(VENV)/installed tests/requirements.txt
	$(PIP) -r requirements.txt -r tests/requirements.txt $(if $(filter newest,$(STACK)),jupyterlab playwright xllamacpp)
	touch $@

readme: $(VENV)/ready
	$(PY) tests/readme.py content/model_outputs/triage

# What was trained and fetched stays in content/.
clean:
	rm -rf .venv
