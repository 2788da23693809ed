# make run    the notebook from top to bottom on the embedded model and data_examples; CPU is enough
# make test   every test, on the stack of tests/stacks/$(STACK).txt
# make lint   ruff over module, tests and notebook
# Each sets up all it needs in .venv/$(STACK).
STACK ?= newest
VENV := .venv/$(STACK)
PY := $(VENV)/bin/python

# What `make run` sets in the hyperparameter cell. A 135M model wants a higher learning rate than a 7B one.
MODEL ?= embedded
DATA ?= data_examples/*.jsonl
RUN_NAME ?= triage
EPOCHS ?= 5
LEARNING_RATE ?= 4e-4
# More settings: make run SET="-p lora_r 16 -p seed 1"
SET ?=
RUN_DIR := content/model_outputs/$(RUN_NAME)

.PHONY: run test lint clean

run: $(VENV)/ready
	mkdir -p $(RUN_DIR)
	$(PY) -m papermill finetune_mistral.ipynb $(RUN_DIR)/notebook.ipynb --kernel python3 --no-progress-bar \
	  -p base_model "$(MODEL)" -p data_files "$(DATA)" -p run_name "$(RUN_NAME)" -p epochs $(EPOCHS) \
	  -p learning_rate $(LEARNING_RATE) -p max_new_tokens 64 -p push_to_hub False $(SET)
	$(PY) -m nbconvert --to html --log-level WARN $(RUN_DIR)/notebook.ipynb
	@echo "Open $(RUN_DIR)/notebook.html; the adapter is in $(RUN_DIR)/final_model"

test: $(VENV)/ready
	$(PY) -m pytest

lint: $(VENV)/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(VENV)/ready: requirements.txt tests/requirements.txt tests/stacks/$(STACK).txt
	python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check \
	  -r requirements.txt -r tests/requirements.txt -c tests/stacks/$(STACK).txt
	touch $@

clean:
	rm -rf .venv content
