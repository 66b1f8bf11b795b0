# Every verb makes the virtual environment first, when it is missing, or older than the lock file that it was made of.
VENV   := .venv
MADE_OF := $(shell cat .venv/locked 2>/dev/null)
PYTHON ?= $(or $(shell command -v python3.11),python3)
BIN    := $(VENV)/bin
LOCK   ?= $(or $(MADE_OF),cluster/requirements-cpu.lock)
PYTEST := $(BIN)/python -m pytest --durations=20 --durations-min=10
PAIRED := $(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder
PEERS  := .peers
RUN    ?= demo-$(shell date +%Y%m%d-%H%M%S)

.DEFAULT_GOAL := help
.PHONY: help another setup demo tiny test test-all unit check format bench bench-peers gpu soak dashboards reference lock clean

help: ## print these verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/ready ## make the virtual environment from the lock file (for GPUs: LOCK=cluster/requirements-gpu.lock)

$(VENV)/ready: $(VENV)/locked pyproject.toml
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/locked: $(LOCK) cluster/setup.sh $(if $(filter-out $(LOCK),$(MADE_OF)),another)
	PYTHON=$(PYTHON) cluster/setup.sh $(VENV) $(LOCK)
	echo $(LOCK) >$@

demo: setup ## distil a real language model on this machine, about ten minutes with its models; ARM=never opens no gate
	$(BIN)/eopd models demo
	$(BIN)/eopd train configs/demo.yaml --set run.name=$(RUN)$(ARM:%=-%) $(ARM:%=--set loss.gate=%)

tiny: setup ## the whole loop on tiny models, about two minutes
	$(BIN)/eopd models tiny
	$(BIN)/eopd train configs/tiny.yaml --set run.name=tiny-$(RUN)

test: setup ## the tests of every change, 10 to 15 minutes on two cores
	$(PAIRED) -m "not slow" tests/system tests/house tests/unit tests/contract

test-all: test ## and the slow ones: whole matrices, a Prometheus, a browser, a submitted job
	$(PAIRED) -m slow tests/system tests/contract

unit: setup ## the quick tests alone
	$(PYTEST) tests/house tests/unit

check: setup ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite the code in its one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## loss, driver, overlap, evaluation, a weight sync, an upload, the plan, the simulation, Ray alone; the learner and the teacher beside what others do
	$(BIN)/python tests/bench/bench_loss.py
	$(BIN)/eopd models demo
	$(BIN)/eopd models tiny
	$(BIN)/python tests/bench/bench_learner.py
	$(BIN)/python tests/bench/bench_teacher.py
	$(BIN)/python tests/bench/bench_pipeline.py
	$(BIN)/python tests/bench/bench_weights.py
	$(BIN)/python tests/bench/bench_wire.py
	$(BIN)/python tests/bench/bench_overlap.py
	$(BIN)/python tests/bench/bench_evaluation.py
	$(BIN)/python tests/bench/bench_upload.py
	$(BIN)/python tests/bench/bench_plan.py
	$(BIN)/python tests/bench/bench_simulate.py
	$(BIN)/python tests/bench/bench_ray.py

bench-peers: setup ## a step of ours beside one of TRL's trainers, which it installs into .peers
	test -d $(PEERS) || $(BIN)/pip install -q --disable-pip-version-check --no-deps --target $(PEERS) trl==1.16.0
	$(BIN)/eopd models demo
	$(BIN)/python tests/bench/bench_peers.py --trl $(PEERS)

gpu: setup ## what only a GPU shows: the loss, attention, a learner's step and a whole run, right and how fast
	@$(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available() and 'torch sees no GPU here; make setup LOCK=cluster/requirements-gpu.lock installs the one for GPUs')"
	$(PYTEST) tests/gpu --confcutdir=tests/gpu
	$(BIN)/python tests/bench/bench_loss.py --device cuda --hidden 1024 --dtype bfloat16 --chunk-tokens 2048
	$(BIN)/python tests/bench/bench_learner.py --dtype bfloat16

soak: setup ## half an hour of training with a fault every minute: what is lost, what leaks
	$(BIN)/python tests/system/soak.py

dashboards: setup ## make the Grafana dashboards and the PrometheusRule again
	$(BIN)/python dashboards/build.py

reference: setup ## make the page of all configuration keys and the JSON schema again
	$(BIN)/python docs/reference.py

lock: ## rewrite both lock files (needs uv; options in cluster/lock.sh)
	cluster/lock.sh --torch-backend cpu

clean: ## remove what tests and tools leave behind; runs and models stay
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find eopd tests -name __pycache__ -type d -prune -exec rm -rf {} +
