PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed

.PHONY: demo test lint clean help

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(SETUP)  ## signal propagation of three networks on photographs, and the paper's figures: look into demo/
	$(BIN)/python -m normfree.experiments.photographs demo/photographs
	$(BIN)/normfree spp nf_resnet50 torchvision:resnet50 timm:convnext_tiny --input demo/photographs --out demo/photographs.png --csv demo/photographs.csv
	$(BIN)/normfree spp nf_resnet50 resnetv2_50 skipinit_resnet50 --size 224 --batch 8 --out demo/noise.png
	$(BIN)/normfree reproduce figure1 figure2 --quick --out demo
	@echo "look at demo/photographs.png, demo/noise.png, demo/figure1.png and demo/figure2.png"

test: $(SETUP)  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

lint: $(SETUP)  ## style and types
	$(BIN)/ruff check --output-format=concise .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first: with it in place nothing below asks for another build of it
$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; try make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:  ## everything that was made
	rm -rf $(VENV) demo reproduced build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
