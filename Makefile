PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
KERNEL_TESTS := $(addprefix tests/test_,hashing.py bucket_sort.py attention_fwd.py combine_rounds.py attention_bwd.py backends.py costs.py strict_memory.py)

.DEFAULT_GOAL := help
.PHONY: help install lint format test test-tritons test-gpu demo diagnose bench wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
test-tritons: install  ## the kernels on the oldest and on the newest Triton, interpreted
	for version in 3.6.0 3.9.0; do \
	    $(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/triton-$$version triton==$$version 'numpy==2.3.*' && \
	    PYTHONPATH=.venv/triton-$$version $(BIN)/python -m pytest -n 2 --dist loadfile $(KERNEL_TESTS) || exit 1; \
	done

test-gpu: install  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

demo: install  ## train a small language model with exact and with LSH attention, print a table, draw a picture
	$(BIN)/python -m lsh_kernels demo

diagnose: install  ## recall of attention by rounds and span, on layers that the demo trains, into out/diagnose/
	$(BIN)/python -m lsh_kernels diagnose --out out/diagnose/shared_qk
	$(BIN)/python -m lsh_kernels diagnose --model exact --out out/diagnose/exact

bench: install  ## time attention on the CPU beside its peers, and profile it, into bench/results/
	$(BIN)/python bench/attention.py
	$(BIN)/python bench/profile_cpu.py

wheel: install  ## sdist and wheel into dist/
	$(BIN)/python -m build

clean:  ## remove .venv and everything built
	rm -rf .venv build dist .pytest_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
