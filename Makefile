# Everything a person or CI runs. `make demo` and `make test` need nothing but Python 3.11 or newer and this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := reftserve-data
PROPERTIES := $(addprefix tests/server/engine/test_,mixtures.py prefix_cache.py logprobs.py logits.py sampler.py) tests/server/api/test_fuzz.py
MODEL := $(DATA)/models/HuggingFaceTB--SmolLM2-135M-Instruct

.PHONY: demo test test-thorough chaos bench bench-peers bench-train check docs format generate install model lint-links clean help

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: model ## Serve, upload, train, and show base and intervened answers side by side
	$(BIN)/python examples/demo.py

test: model ## Run every test
	$(BIN)/python -m pytest $(ARGS)

test-thorough: install ## Run the engine's properties on thousands of random workloads, and 21,000 hostile calls (an hour)
	$(BIN)/python -m pytest --hypothesis-profile thorough --timeout 0 $(PROPERTIES)

chaos: install ## Inject faults (kills, full disk, lost database, ...) and print what each costs (a quarter of an hour)
	$(BIN)/python tests/chaos.py $(ARGS)

bench: model ## Measure the engine: takes an hour, alone on the machine
	for script in throughput curve time_to_first_token residency http_streams batch_sizes int8; do \
	  $(BIN)/python benchmarks/$$script.py || exit 1; done

bench-peers: model ## Measure it beside vLLM, llama.cpp and PEFT (8 GB, and half an hour to set up)
	benchmarks/peers/setup.sh
	$(BIN)/python benchmarks/peers/run.py

bench-train: model ## Measure training beside pyreft and PEFT (half an hour)
	benchmarks/peers/setup.sh
	$(BIN)/python benchmarks/train.py

check: install lint-links ## Lint, format check, generated client and pages, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/generate_sync_client.py --check
	$(BIN)/python docs/generate_rooms.py --check
	$(BIN)/python docs/generate_settings.py --check
	MYPYPATH=.lint $(BIN)/mypy -p reftserve.interventions -p reftserve.client -p reftserve.server
	PYTHONPATH=.lint $(BIN)/lint-imports

docs: install ## Write docs/settings.md and the drawing in docs/architecture.md
	$(BIN)/python docs/generate_settings.py
	$(BIN)/python docs/generate_rooms.py

format: install ## Apply the formatter and the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate: install ## Write the blocking client, client/_sync, from client/_async
	$(BIN)/python .ci/generate_sync_client.py

install: $(VENV)/installed ## Create .venv with the pinned versions

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "ReftServe needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1 | tail -n 1);" \
	    "name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[server,dev]'
	touch $@

model: $(MODEL)/config.json ## Fetch the base model once

$(MODEL)/config.json: | install
	$(BIN)/python examples/fetch_base_model.py $(MODEL)

# mypy and import-linter read the packages by their installed names, which editable installs hide from them.
lint-links:
	@mkdir -p .lint/reftserve
	@for package in server client interventions; do ln -sfn ../../$$package .lint/reftserve/$$package; done

clean: ## Remove the environment and the demo's data
	rm -rf $(VENV) .lint $(DATA)
