# make demo: the main job on the embedded default.  make test: what CI runs.  make help: the rest.
PYTHON ?= python3
BIN := .venv/bin

help:                ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## +/\t/' | expand -t 14

PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check

.venv/made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: NativeBit needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	touch $@

# with JAX for the NVIDIA GPU, where the driver says that there is one
COMMA := ,
CUDA = $(shell nvidia-smi 2>/dev/null | sed -nE 's/.*CUDA[A-Za-z ]*Version: *([0-9]+).*/\1/p')
GPU = $(addprefix $(COMMA),$(if $(filter 12,$(CUDA)),cuda12) $(if $(filter 13 14,$(CUDA)),cuda))

.venv/ready: settings.ini setup.py | .venv/made
	$(PIP) -e '.[dev$(strip $(GPU))]'
	touch $@

# on a machine without a GPU, PyTorch's CPU wheels save gigabytes: make env, then .venv/bin/python -m pip install torch --index-url https://download.pytorch.org/whl/cpu
.venv/torch: settings.ini setup.py | .venv/made   # with what .venv/ready has: pip is called once
	$(PIP) -e '.[dev,torch,hf$(strip $(GPU))]'
	touch .venv/ready $@

.venv/docs: .venv/ready
	$(PIP) -e '.[docs]'
	touch $@

.venv/notebooks: .venv/ready
	$(PIP) -e '.[notebooks]'
	touch $@

env: .venv/ready     ## make the environment in .venv

demo: .venv/ready    ## fine-tune the shipped checkpoint to 3 bits and print the table (3 to 9 minutes on 2 cores)
	$(BIN)/python -m nativebit demo

# notebooks and tests compile the same small steps: once is enough, and quicker with fewer optimizations (level 0 where little is computed); a crash names its line
# XLA's older code generator compiles two to three times sooner on a CPU; a flag that jaxlib doesn't have would end Python
QUICK = $(shell grep -qs xla_cpu_use_fusion_emitters .venv/lib/python*/site-packages/jaxlib/libjax_common.so && echo --xla_cpu_use_fusion_emitters=false)
test test-notebooks test-python test-slow: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/.venv/jax-cache
test test-notebooks test-python test-slow: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test test-notebooks test-python test-slow: export XLA_FLAGS = --xla_backend_optimization_level=1
test test-notebooks test-python test-slow: export PYTHONFAULTHANDLER = 1
test: .venv/torch check-generated check-readme   ## everything CI checks: notebooks, then tests
	$(MAKE) test-notebooks test-python

# notebooks run as on a laptop, GPU or not
test-notebooks: export TRITON_INTERPRET = 1
test-notebooks: export CUDA_VISIBLE_DEVICES =
test-notebooks: .venv/torch
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/test_notebooks.py

test-python test-notebooks: export XLA_FLAGS = --xla_backend_optimization_level=0 $(QUICK)
# NumPy is imported before a worker has its core, and threads on one core wait for each other
test-python: export OPENBLAS_NUM_THREADS = 1
test-python: .venv/torch
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder tests

test-slow: .venv/torch   ## the tests that CI has no time for: the demo, two processes, a full disk
	$(BIN)/python -m pytest -q -n 2 tests -m slow

fuzz: .venv/torch        ## 200,000 damaged files for each reader (hours; stopped, the same command goes on); FUZZ='--seed 1 --mutants 1000'
	$(BIN)/python tests/fuzz/campaign.py --out .fuzz/campaign.jsonl $(FUZZ)

gpu-check:           ## on an NVIDIA GPU: every command of tools/gpu_check.txt, and data/results/gpu_check.json
	$(or $(wildcard $(BIN)/python),$(PYTHON)) tools/gpu_check.py

check-generated: .venv/ready   ## the package is what the notebooks export, and the notebooks are clean
	tools/check_generated $(BIN)

check-readme: .venv/ready      ## README.md is what nbs/index.ipynb says
	$(BIN)/python tools/readme.py | diff -u README.md - || { echo "error: README.md differs from nbs/index.ipynb; run make readme"; exit 1; }

readme: .venv/ready  ## rebuild README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py > README.md.tmp && mv README.md.tmp README.md

docs: .venv/docs     ## the book: all notebooks as web pages in _docs/html, none of them run again
	$(BIN)/python -m sphinx -q -c tools/docs nbs _docs/html && echo "open _docs/html/index.html"

lab: .venv/notebooks ## the chapters in JupyterLab
	$(BIN)/jupyter lab nbs/index.ipynb

hooks: .venv/ready   ## nbdev's git hooks: clean notebooks before they are committed, merge them as notebooks
	PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_install_hooks

clean:               ## remove the environment and what runs have written
	rm -rf .venv logs _proc _docs

# one pip at a time in one environment
.NOTPARALLEL:
.PHONY: help env demo test test-notebooks test-python test-slow fuzz gpu-check check-generated check-readme readme docs lab hooks clean
