# Every target is a command that users and CI call; see README.md.
SHELL := /bin/bash
# Which Python makes .venv: 3.11, 3.12 or 3.13; unset, the first that runs.
PYTHON ?=
BIN := .venv/bin
MINUTES_FILE := build/test-minutes.json
# Some images set it: then each process that imports torch or vLLM compiles them anew, 10 s of CPU each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo serve test test-faults check bench bench-scaling bench-soak bench-connections bench-cost \
	bench-adapters bench-ledger loadtest lock clean

setup: .venv/.ready

.venv/.ready: requirements.lock scripts/uv.lock pyproject.toml scripts/setup.sh
	@PYTHON="$(PYTHON)" bash scripts/setup.sh

demo: setup
	@$(BIN)/bespoke demo $(if $(ONESHOT),--oneshot)

serve: setup
	@$(BIN)/bespoke serve --config configs/serve/cpu.yaml

# First what needs no engine, on all cores; then what starts engines and services, alone on the machine.
# The file's option has an "=": pytest would take an existing file of its own for the tests to run.
test: setup check
	@rm -f $(MINUTES_FILE); status=0; \
	$(BIN)/pytest -m "not slow" -n logical --maxprocesses 4 --dist loadfile --minutes-file=$(MINUTES_FILE) || status=1; \
	$(BIN)/pytest -m slow --minutes-file=$(MINUTES_FILE) || status=1; exit $$status

test-faults: setup
	$(BIN)/pytest tests/system/faults

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Ours beside a bare vLLM and the peers: 70 minutes, alone on the machine, please. PAIRS=3 or QUICK=1: shorter.
bench: bench-bases
	@$(BIN)/python -m loadtests.bench overhead $(if $(QUICK),--quick) $(if $(PAIRS),--pairs $(PAIRS))

bench-scaling: bench-bases
	@$(BIN)/python -m loadtests.bench scaling

bench-soak: bench-bases
	@$(BIN)/python -m loadtests.bench soak --minutes $(or $(MINUTES),30)

bench-connections: bench-bases
	@$(BIN)/python -m loadtests.bench connections

bench-cost: bench-bases
	@$(BIN)/python -m loadtests.bench cost

.PHONY: bench-bases
bench-bases: setup
	@$(BIN)/bespoke base import configs/bases/tiny.yaml
	@$(BIN)/bespoke base import configs/bases/smollm2-135m.yaml

bench-adapters: setup
	@$(BIN)/bespoke base import configs/bases/smollm2-135m.yaml
	@$(BIN)/python -m loadtests.bench.adapters

bench-ledger: setup
	@$(BIN)/python -m loadtests.bench.ledger

# make loadtest SCENARIO=steady USERS=16 [DURATION=60s] [MODEL=tiny] [WEB=1] [OUT=file.json] [HOST=http://…]
loadtest: setup
	@$(if $(HOST),,$(BIN)/bespoke base import configs/bases/$(or $(MODEL),tiny).yaml)
	@$(BIN)/python -m loadtests.load $(or $(SCENARIO),steady) --users $(or $(USERS),16) \
		$(if $(DURATION),--duration $(DURATION)) $(if $(MODEL),--model $(MODEL)) $(if $(WEB),--web) \
		$(if $(OUT),--out $(OUT)) $(if $(HOST),--host $(HOST))

lock: setup
	bash scripts/lock.sh

clean:
	rm -rf .venv .bespoke .cache build *.egg-info
