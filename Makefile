# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# Both create .venv where it is missing (.ci/venv: Python 3.11+, CPU or CUDA torch as the machine has it).

RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"
WORKERS ?= 2

.PHONY: help demo chain test lint format test-slow test-gpu test-two-nodes clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

.venv/.ready: pyproject.toml constraints.txt .ci/venv
	@.ci/venv

demo: .venv/.ready  ## what pre-training is worth: from scratch, interrupted, resumed, fine-tuned, measured, under 12 minutes
	@$(RUN) bash recipes/chains/demo.sh

chain: .venv/.ready  ## the fine-tuning chain on a BEIR folder: make chain DATA=FOLDER (two CPU cores, under 40 minutes)
	@$(RUN) DATA=$(DATA) bash recipes/chains/small.sh

test: .venv/.ready  ## lint, then every test that needs neither a GPU nor patience (WORKERS=2 processes)
	@$(RUN) ruff check . && $(RUN) ruff format --check .
	@$(RUN) python -m pytest --numprocesses $(WORKERS) --dist worksteal

lint: .venv/.ready  ## ruff, without changing anything
	@$(RUN) ruff check . && $(RUN) ruff format --check .

format: .venv/.ready  ## ruff, fixing what it can
	@$(RUN) ruff check --fix . ; $(RUN) ruff format .

test-slow: .venv/.ready  ## the long proofs: 50 kill points, every ZeRO stage across world sizes
	@$(RUN) python -m pytest -m slow --timeout=3600

test-gpu: .venv/.ready  ## the tests that need a CUDA device
	@$(RUN) python -m pytest -m gpu

test-two-nodes: .venv/.ready  ## deepspeed --hostfile over two network namespaces (root, pdsh, sshd, iproute2)
	@$(RUN) bash tests/cluster/two_nodes.sh

clean:  ## remove what the demo made (the virtual environment stays)
	rm -rf demo_run chain_run
