# Installs into .venv, .venv-resilience, .venv-te and .venv-hf (and .uv where the machine has no uv); nothing
# outside this folder changes, but by `make slurm`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install resilience te hf slurm demo test quick lint types

# Test processes, and what they test. A multi-rank test starts its ranks with one thread each. One
# process more than small machines have cores: tests of SLURM and of hung ranks mostly wait.
WORKERS ?= 3
TESTS ?= tests

BIN := .venv/bin
INSTALLED := .venv/.installed
RESILIENCE := .venv-resilience/.installed
TE := .venv-te/.installed
HF := .venv-hf/.installed

# A folder of wheels of Transformer Engine, for `make te`: no package index has all of them.
TE_WHEELS ?= .gpu/wheels

# A version manager may put a `uv` on PATH that only fails: ask it before relying on it.
UV := $(if $(shell uv --version 2>/dev/null),uv,.uv/bin/uv)

help: ## list these targets
	@grep -E '^[a-z]+:.* ## ' $(MAKEFILE_LIST) | sed -E 's/:.* ## /\t/' | expand -t 12

install: $(INSTALLED) ## install the pinned versions into .venv; does nothing when nothing changed

resilience: $(RESILIENCE) ## nvidia-resiliency-ext beside the rest, in .venv-resilience, for tests of it

te: $(TE) ## Transformer Engine in .venv-te, for tests of it: make te TE_WHEELS=FOLDER

hf: $(HF) ## an older transformers in .venv-hf, for tests that it loads what is exported

# Debian's packages, and root: the tests start daemons of their own, and the package none.
slurm: ## install SLURM for tests of job scripts, where it is missing (Debian, Ubuntu; needs root)
	@for command in slurmd slurmctld munged shellcheck; do \
	  command -v $$command >/dev/null || missing=1; done; \
	[ -z "$${missing:-}" ] || { export DEBIAN_FRONTEND=noninteractive; apt-get -qq update && \
	  apt-get -qq install --yes --no-install-recommends slurm-wlm munge shellcheck >/dev/null; }

demo: install ## train the tiny example from nothing, evaluate it and write its report
	@$(BIN)/agrpo train examples/tiny.yaml

# Hundreds of processes import the package and its tests: see below.
COMPILED = $(BIN)/python -m compileall -q agrpo_megatron tests tools || true

test: install ## run the tests, for instance: make test TESTS=tests/config/test_schema.py WORKERS=4
	@$(COMPILED)
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(TESTS)

# For each edit: what needs no launcher, and one layout of each kind.
KINDS := tp2 pp2 cp2 dp2
QUICK := tests/diffusion tests/tasks tests/config \
  $(foreach kind,$(KINDS),'tests/training/test_layouts.py::test_the_layout_changes_nothing[$(kind)]')

quick: install ## run the tests of diffusion, tasks and settings, and of one layout of each kind
	@$(COMPILED)
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(QUICK)

lint: install ## check style and format
	@failed=0; $(BIN)/ruff check . || failed=1; $(BIN)/ruff format --check . || failed=1; exit $$failed

types: install ## check types
	@$(BIN)/pyright

# Compiled at once, because many images forbid Python to keep what it compiled at an import:
# there, every process would spend twenty seconds on importing Megatron-Core.
$(INSTALLED): pyproject.toml constraints.txt | $(filter .uv/%,$(UV))
	@$(BIN)/python --version >/dev/null 2>&1 \
	  || { rm -rf .venv && $(UV) venv --quiet --python 3.12 .venv; }
	@echo "Installing into .venv: about 5 GB, minutes on a first install"
	@$(UV) pip install --quiet --python .venv --compile-bytecode \
	  --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Apart from .venv, so that training is tested with the package and without. Its wheel asks for
# glibc 2.39, which only its timing of GPU kernels needs.
NEWER := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),x86_64-manylinux_2_39)

$(RESILIENCE): pyproject.toml constraints.txt $(INSTALLED)
	@.venv-resilience/bin/python --version >/dev/null 2>&1 \
	  || { rm -rf .venv-resilience && $(UV) venv --quiet --python 3.12 .venv-resilience; }
	@$(UV) pip install --quiet --python .venv-resilience $(addprefix --python-platform ,$(NEWER)) --compile-bytecode \
	  --constraint constraints.txt --editable '.[dev,resilience]'
	@touch $@

# Apart from .venv, since its extension works with the torch that it was built for and no other.
# What torch itself asks for takes the version that goes with it.
TE_TORCH := 2.11.0
FOLLOWING_TORCH := ^(torch|triton|setuptools|nvidia-[a-z0-9-]+|cuda-[a-z-]+)==

$(TE): pyproject.toml constraints.txt $(wildcard $(TE_WHEELS)/*.whl) | $(filter .uv/%,$(UV))
	@ls $(TE_WHEELS)/transformer_engine_torch-*.whl >/dev/null 2>&1 || { echo >&2 \
	  "no wheels of Transformer Engine in TE_WHEELS=$(TE_WHEELS): docs/install.md tells how to build them"; \
	  exit 1; }
	@.venv-te/bin/python --version >/dev/null 2>&1 \
	  || { rm -rf .venv-te && $(UV) venv --quiet --python 3.12 .venv-te; }
	@grep -vE '$(FOLLOWING_TORCH)' constraints.txt > .venv-te/constraints.txt
	@$(UV) pip install --quiet --python .venv-te --compile-bytecode \
	  --constraint .venv-te/constraints.txt --editable '.[dev]' torch==$(TE_TORCH) einops onnxscript
	@$(UV) pip install --quiet --python .venv-te --compile-bytecode --no-deps --no-index \
	  $(TE_WHEELS)/*.whl
	@touch $@

# A folder of three packages to put on PYTHONPATH, which costs seconds. With this version LLaDA's
# own modelling code works; what it pins differs from constraints.txt.
HF_OLDER := transformers==4.46.3 tokenizers==0.20.3 huggingface-hub==0.36.2

$(HF): Makefile $(INSTALLED)
	@rm -rf .venv-hf
	@$(UV) pip install --quiet --python .venv --target .venv-hf --no-deps $(HF_OLDER)
	@touch $@

# A private uv, since some systems refuse `pip install` outside a virtual environment. Where
# `venv` brings no pip (Debian without python3-venv), the system's pip installs into it.
.uv/bin/uv:
	@echo "No working uv on PATH: installing one into .uv"
	@rm -rf .uv; python3 -m venv .uv >/dev/null 2>&1 || { rm -rf .uv; \
	  python3 -m venv --without-pip .uv && python3 -m pip --version >/dev/null; } \
	  || { echo "cannot make .uv: install python3-venv, or put uv on PATH" >&2; exit 1; }
	@pip=".uv/bin/python -m pip"; $$pip --version >/dev/null 2>&1 \
	  || pip="python3 -m pip --python .uv/bin/python"; \
	  $$pip install -qq --disable-pip-version-check --constraint constraints.txt uv
