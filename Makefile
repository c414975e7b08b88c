PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
OUT ?= out/gpu
GPU_WHEELS := reformer-pytorch axial-positional-embedding colt5-attention einops hyper-connections local-attention \
    product-key-memory torch-einops-utils
KERNEL_TESTS := $(addprefix tests/test_,hashing.py bucket_sort.py attention_fwd.py attention_bwd.py combine_rounds.py residual.py \
    backends.py costs.py strict_memory.py compile.py audit.py audit_baseline.py control_flow.py time_model.py)

.DEFAULT_GOAL := help
.PHONY: help install lint format test test-tritons offline test-gpu bench-gpu rehearse-gpu gpu-wheels demo diagnose \
    audit audit-check bench report profile wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(INSTALLED)  ## create .venv with the pinned development versions and this package, editable

lint: install  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## ruff: fix and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: install  ## all tests that need no GPU (Triton's interpreter where there is none)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# the interpreter of triton 3.6.0 fails on run-time range bounds with numpy >= 2.4
test-tritons: install  ## the kernels on the oldest and on the newest Triton, interpreted and compiled
	for version in 3.6.0 3.9.0; do \
	    $(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/triton-$$version triton==$$version 'numpy==2.3.*' && \
	    PYTHONPATH=.venv/triton-$$version $(BIN)/python -m pytest -n 2 --dist loadfile $(KERNEL_TESTS) || exit 1; \
	done

# without a registry and without a .venv, for a machine that has torch and Triton
offline:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	if test -d gpu-wheels; then $(PYTHON) -m pip install --quiet --no-deps --no-index gpu-wheels/*.whl; fi

test-gpu: offline  ## on a GPU machine, offline: the tests that need a GPU
	$(PYTHON) -m pytest -m gpu

bench-gpu: offline  ## on a GPU machine, offline: GPU tests, all suites, report, within ten minutes, into $(OUT); ARGS="--commit ABC"
	$(PYTHON) bench/gpu.py --out $(OUT) $(ARGS)

rehearse-gpu: install  ## bench-gpu on a CPU with interpreted kernels and tiny sizes, into out/rehearsal
	rm -rf out/rehearsal
	$(BIN)/python bench/gpu.py --rehearse --out out/rehearsal $(ARGS)

gpu-wheels: install  ## fetch the peers that a GPU machine lacks, for bench-gpu, into gpu-wheels/
	rm -rf gpu-wheels
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --constraint constraints.txt --dest gpu-wheels $(GPU_WHEELS)

# OpenMP's own setting: beside other programs, threads that spin while they wait made steps of one second last ten
demo diagnose: export OMP_WAIT_POLICY ?= PASSIVE

demo: install  ## train a small language model with exact and with LSH attention, print a table, draw a picture
	$(BIN)/python -m lsh_kernels demo

diagnose: install  ## recall of attention by rounds and span, on layers that the demo trains, into out/diagnose/
	$(BIN)/python -m lsh_kernels diagnose --out out/diagnose/shared_qk
	$(BIN)/python -m lsh_kernels diagnose --model exact --out out/diagnose/exact

audit: install  ## what the compiled kernels say on five targets, modelled times; accepts it into bench/results/ and docs/; ARGS="--full"
	$(BIN)/python -m lsh_kernels audit --out bench/results/audit.csv --model --picture docs/audit.png \
	    $(addprefix --measured ,$(firstword $(wildcard bench/results/*h100*.csv))) $(ARGS)
	$(BIN)/python bench/dense.py

audit-check: install  ## fail if a kernel got worse than in bench/results/audit.csv; ARGS="--targets sm_90"
	$(BIN)/python -m lsh_kernels audit --baseline bench/results/audit.csv $(ARGS)

bench: install  ## time attention, its stages and its peers into bench/results/; ARGS="--quick", ARGS="--help"
	$(BIN)/python -m lsh_kernels bench $(ARGS)

report: install  ## tables into README.md and pictures into docs/, from bench/results/
	$(BIN)/python bench/report.py

profile: install  ## where the torch backend's time goes on a CPU, into bench/results/
	$(BIN)/python bench/profile_cpu.py

wheel: install  ## sdist and wheel into dist/
	$(BIN)/python -m build

clean:  ## remove .venv and everything built
	rm -rf .venv build dist .pytest_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
