# Everything from nothing: Python 3.11, make and g++ are enough. `make demo` and `make test` install first, once.

BOOT := $(or $(shell command -v python3.11),$(shell command -v python3))
PY := .venv/bin/python
PYTEST_ARGS ?=
# whole files to two workers: what a file's tests share is made once
WORKERS := -n 2 --dist loadfile

# one thread per process: with more, tiny models spin in barriers and run 20 to 70 times slower on a shared machine
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# the deepspeed launcher starts `python` from the PATH
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help install demo fullsize gpu-check reproduce-rm vllm-check docs lint style check test test-all clean

help:
	@echo "make demo     train a reward, align the tiny Wan with it, write runs/demo/report.html"
	@echo "make test     lint and the tests (but those that need a GPU, and the longest)"
	@echo "make test-all also the longest: every loop killed at five points on one rank and two"
	@echo "make check    lint and the fast tests"
	@echo "make style    how dense the source is, and what breaks the limits"
	@echo "make reproduce-rm  the paper's comparison of reward models in the embedded world, five seeds, hours"
	@echo "make fullsize Wan 1.3B and Qwen3-VL 2B at their true sizes on a CPU with 24 GB, under 25 minutes"
	@echo "make gpu-check on a GPU: the tests that need one, and a table of measured speeds that plans read"
	@echo "make vllm-check  chains of thought by a real vLLM against ours, on a CPU; installs 3 GB into .venv-vllm once"
	@echo "make docs     the documentation as a site in site/; installs 200 MB into .venv-docs once"
	@echo "make install  only create .venv"
	@echo "make clean    remove runs and caches, keep the environments"

install: .venv/.installed

# the stamp is written last, so an interrupted install starts again and a finished one is not repeated
.venv/.installed: setup.py constraints.txt
	@test -n "$(BOOT)" || { echo "Python 3.11 or later is needed"; exit 1; }
	@$(BOOT) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(BOOT) is older than 3.11"; exit 1; }
	@test ! -L .venv || echo "== .venv is a link: from now on the environment $$(readlink -f .venv) imports this checkout, and no other"
	@echo "== installing into .venv, once: about two minutes and 2 GB"
	test -x $(PY) || $(BOOT) -m venv .venv
	$(PY) -m pip install -c constraints.txt "torch>=2.6,<2.14"
	$(PY) -m pip install -c constraints.txt -e ".[test]"
	@touch $@

demo: .venv/.installed
	$(PY) experiments/demo.py

fullsize: .venv/.installed
	$(PY) experiments/fullsize.py

# exit code 2 without a GPU; HF_HUB_OFFLINE=0 behind it lets attention kernels of the hub be downloaded
gpu-check: .venv/.installed
	$(PY) experiments/gpu_check.py

reproduce-rm: .venv/.installed
	$(PY) experiments/reproduce_rm.py

vllm-check: .venv/.installed .venv-vllm/.installed
	$(PY) experiments/vllm_check.py

# vLLM's pins clash with ours
.venv-vllm/.installed: experiments/vllm_environment.py
	@echo "== installing vLLM into .venv-vllm, once: about five minutes and 3 GB"
	$(BOOT) experiments/vllm_environment.py .venv-vllm
	@touch $@

# NO_MKDOCS_2_WARNING: a remark of mkdocs-material about mkdocs 2
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# the extra docs of setup.py without this project, whose sources are read and not imported
.venv-docs/.installed: setup.py
	@echo "== installing mkdocs into .venv-docs, once"
	test -x .venv-docs/bin/python || $(BOOT) -m venv .venv-docs
	.venv-docs/bin/python -m pip install "mkdocs>=1.6,<2" "mkdocs-material>=9.5" "mkdocstrings[python]>=0.30" "ruff>=0.11"
	@touch $@

# rules, format, import layers, density
lint: .venv/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports --no-logo
	$(PY) tests/style.py

style: .venv/.installed
	$(PY) tests/style.py

check: lint
	$(PY) -m pytest $(WORKERS) -m "not slow and not long and not gpu" $(PYTEST_ARGS)

test: lint
	$(PY) -m pytest $(WORKERS) -m "not gpu and not long" $(PYTEST_ARGS)

test-all: lint
	$(PY) -m pytest $(WORKERS) -m "not gpu" $(PYTEST_ARGS)

clean:
	rm -rf runs build site .pytest_cache .ruff_cache *.egg-info
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
