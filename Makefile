# One word per thing a person does. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup remake demo fetch-terrain test test-core test-cpp cuda-check cuda-link lint format bench bench-quick clean

# The first Python that the pinned tools run on; `make PYTHON=… setup` names another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# An interpreter that was asked for takes the place of another version in .venv; the one found here does not.
ifneq ($(origin PYTHON),file)
REMAKE := $(filter-out $(call version,$(BIN)/python),$(or $(call version,$(PYTHON)),nothing))
endif
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
BUILD_INPUTS := setup.py CMakeLists.txt pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
GENERATE := $(BIN)/python -m difusores generate --model bundled:digits --num 36 --steps 25 --seed 1
# a process for each core, up to eight, which share the cores (tests/conftest.py) and take work from each other
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
# where ops answer; other tests meet what is compiled nowhere, or in processes that choose for themselves
CORE := tests/ops tests/models tests/schedulers tests/pipelines $(addprefix tests/test_,accelerate.py approximate.py functional.py)
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/cpp/*.cpp tests/cuda_emulation/*.h tests/cuda_emulation/*.cpp benchmarks/*.cpp)

stop = { printf '\n%s\n' $(1) >&2; exit 1; }
NO_PYTHON := "Python 3.11 or newer was not found: run 'apt install python3.11 python3.11-venv python3.11-dev'"
NOT_RUNNING = "$(PYTHON) does not run: is it installed, and spelt like this?"
NO_VENV = "$(PYTHON) cannot make virtual environments: run 'apt install python$(call version,$(PYTHON))-venv'"
NO_INDEX := "Packages could not be installed (the message of pip is above): is the package index within reach? Then run the same command again"
NO_BUILD := "The package could not be installed (the message of the compiler or of pip is above): mend that and run the same command again"
NO_COMPILER = "The tests need the compiled package: $$(cat difusores/_build_reason.txt). Then run the same command again"

help:
	@printf '%s\n' \
	  'make setup      .venv with the package, compiled where a C++ compiler is found' \
	  'make demo       samples a grid of digits into demo.png and prints the speed' \
	  'make fetch-terrain  downloads the weights that one test compares with ONNX Runtime, 39 MB' \
  'make test       the whole suite' \
	  'make test-core  the core of the suite without the compiled module' \
	  'make test-cpp   the kernels in a plain C++ test under the sanitizers' \
	  'make cuda-check the CUDA and Triton kernels compiled for every architecture and held to their budgets; needs nvcc' \
	  'make cuda-link  the whole CUDA module linked to the CUDA build of torch 2.14.1 (downloads 0.5 GB); needs nvcc' \
	  'make lint       ruff, mypy, clang-format' \
	  'make format     ruff and clang-format write what lint asks for' \
	  'make bench      all benchmarks of a CPU, two to three hours; then their tables and picture' \
	  'make bench-quick  whole networks beside their peers, under 3 minutes' \
	  'make clean      removes what was built; .venv stays'

setup: .venv/package.stamp

# Each stamp is written by the last line of its recipe, so that a broken run starts again where it broke.
.venv/tools.stamp: constraints.txt $(if $(REMAKE),remake)
	@[ -n "$(PYTHON)" ] || $(call stop,$(NO_PYTHON))
	@[ -n "$(call version,$(PYTHON))" ] || $(call stop,$(NOT_RUNNING))
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(call stop,$(NO_VENV))
	@{ [ -z "$(REMAKE)" ] && $(BIN)/python -m pip --version >/dev/null 2>&1; } || $(PYTHON) -m venv --clear .venv || $(call stop,$(NO_VENV))
	@echo 'Installing PyTorch and the build tools into .venv (minutes the first time) …'
	@$(PIP) torch setuptools wheel cmake ninja pybind11 || $(call stop,$(NO_INDEX))
	@touch $@

.venv/package.stamp: .venv/tools.stamp $(BUILD_INPUTS)
	@echo 'Installing the package …'
	@$(PIP) numpy pillow safetensors huggingface_hub tqdm || $(call stop,$(NO_INDEX))
	@$(PIP) --no-build-isolation --editable . || $(call stop,$(NO_BUILD))
	@if [ -f difusores/_build_reason.txt ]; then echo "Installed as pure Python, which is slower: $$(cat difusores/_build_reason.txt)"; \
	else touch $@; fi  # no stamp for pure Python: the next make looks for a compiler again

.venv/test.stamp: pyproject.toml constraints.txt | .venv/package.stamp
	@echo 'Installing what the tests and linters need …'
	@$(PIP) --no-build-isolation --editable '.[dev]' || $(call stop,$(NO_INDEX))
	@touch $@

demo: .venv/package.stamp
	@$(GENERATE) --out demo.png
	@echo 'The same with DIFUSORES_BACKEND=reference:'
	@DIFUSORES_BACKEND=reference $(GENERATE) --out build/demo-reference.png

fetch-terrain: .venv/package.stamp
	@$(BIN)/python -m difusores fetch terrain

test: .venv/test.stamp
	@[ ! -f difusores/_build_reason.txt ] || $(call stop,$(NO_COMPILER))
	@$(PYTEST)

test-core: .venv/test.stamp
	@DIFUSORES_DISABLE=1 $(PYTEST) -m 'not slow' $(CORE)

test-cpp: .venv/tools.stamp
	@$(BIN)/cmake -S . -B build/cpp-tests -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DDIFUSORES_MODULE=OFF -DDIFUSORES_CPP_TESTS=ON -DDIFUSORES_SANITIZE=ON
	@$(BIN)/cmake --build build/cpp-tests
	@$(BIN)/ctest --test-dir build/cpp-tests --output-on-failure

cuda-check: .venv/test.stamp
	@$(BIN)/python tests/triton_budget.py $(if $(ARCHITECTURES),--architecture $(ARCHITECTURES))
	@$(BIN)/python tests/cuda_budget.py $(if $(ARCHITECTURES),--architecture $(ARCHITECTURES))

# not in .ci/run: half a gigabyte and minutes
cuda-link: .venv/test.stamp
	@$(BIN)/python tests/cuda_link.py $(if $(ARCHITECTURES),--architecture $(ARCHITECTURES))

lint: .venv/test.stamp
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

format: .venv/test.stamp
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/clang-format -i $(CPP)

.venv/bench.stamp: pyproject.toml constraints.txt | .venv/test.stamp
	@echo 'Installing the peers of the benchmarks …'
	@$(PIP) --no-build-isolation --editable '.[bench]' || $(call stop,$(NO_INDEX))
	@touch $@

bench-quick: .venv/bench.stamp
	@$(BIN)/python benchmarks/bench_models.py --quick

# all of it; benchmarks/results/ keeps the figures, of which the last line makes the tables and the picture
bench: .venv/bench.stamp
	@mkdir -p benchmarks/results
	@$(BIN)/python benchmarks/bench_schedulers.py --markdown
	@for of in ops attention unet; do $(BIN)/python benchmarks/bench_$$of.py --json benchmarks/results/$$of.json; done
	@$(BIN)/python -m pytest -p no:xdist benchmarks/test_ops_benchmark.py
	@for of in models loops approximate setup memory; do $(BIN)/python benchmarks/bench_$$of.py; done
	@$(BIN)/python benchmarks/bench_models.py --table

clean:
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache demo.png
	@rm -f difusores/_C.*.so difusores/_build_reason.txt .venv/*.stamp
