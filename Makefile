# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# Both create .venv where it is missing (.ci/venv: Python 3.11+, CPU or CUDA torch as the machine has it).

RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: help demo test lint format test-slow test-gpu test-two-nodes clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

.venv/.ready: pyproject.toml constraints.txt .ci/venv
	@.ci/venv

demo: .venv/.ready  ## corpus -> shards -> pre-training (interrupted, resumed) -> export, on two CPU cores in ten minutes
	@$(RUN) python launchers/demo.py

test: .venv/.ready  ## lint, then every test that needs neither a GPU nor patience
	@$(RUN) ruff check . && $(RUN) ruff format --check .
	@$(RUN) python -m pytest

lint: .venv/.ready  ## ruff, without changing anything
	@$(RUN) ruff check . && $(RUN) ruff format --check .

format: .venv/.ready  ## ruff, mending what it can
	@$(RUN) ruff check --fix . ; $(RUN) ruff format .

test-slow: .venv/.ready  ## the long proofs: 50 kill points, every ZeRO stage across world sizes
	@$(RUN) python -m pytest -m slow --timeout=3600

test-gpu: .venv/.ready  ## the tests that need a CUDA device
	@$(RUN) python -m pytest -m gpu

test-two-nodes: .venv/.ready  ## deepspeed --hostfile over two network namespaces (root, pdsh, sshd, iproute2)
	@$(RUN) bash tests/cluster/two_nodes.sh

clean:  ## remove what the demo made (the virtual environment stays)
	rm -rf demo_run
