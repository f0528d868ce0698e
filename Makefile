# Everything runs in .venv, made on first use. Needs python3, g++ and make.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# pip would compile every module of torch, which takes longer than to unpack it; the first import compiles what it needs
INSTALL := $(BIN)/pip install -q --no-compile
unexport PYTHONDONTWRITEBYTECODE
# what builds the extension, as pyproject.toml says
BUILD_TOOLS := $(shell sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-all sanitize lint format bench build wheel clean

demo: .venv/base.done
	$(BIN)/metarec-fast demo

# JOBS processes of one thread each; what several threads do is tested by tests that ask for them, and by sanitize
JOBS ?= 2
test: .venv/test.done
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

# Slow tests, all examples and all instruction sets under the sanitizers too; in one process of two threads, as most
# people run it
test-all: .venv/test.done
	$(BIN)/pytest --all
	$(MAKE) sanitize SANITIZE_OPTIONS="--every-isa --all"

# The extension with AddressSanitizer and UndefinedBehaviorSanitizer, and the tests that reach it (or TESTS="...").
# Optimized lightly: that builds sooner, and the faults are the same. Without --every-isa, only the best instruction set
# of this processor is sanitized and run.
SANITIZE_OPTIONS ?= --every-isa
BEST_ISA = $$($(BIN)/python -c "from metarec_fast import _C; print(_C.supported_isas()[-1])")
sanitize: .venv/test.done
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja -Wno-dev \
	  -DMETAREC_SANITIZE=ON -DMETAREC_SANITIZE_ONLY="$(if $(filter --every-isa,$(SANITIZE_OPTIONS)),,$(BEST_ISA))" \
	  -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1 \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$(CURDIR)/build/sanitize" -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize
	$(BIN)/python tests/sanitized/run.py $(SANITIZE_OPTIONS) $(TESTS)

lint: .venv/lint.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h')

format: .venv/lint.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h')

bench: .venv/bench.done
	$(BIN)/python -m bench ratios

build: .venv/base.done

# sdist and wheel into dist/, then the wheel in an environment of its own, where the demo must run
WHEEL_ENV := build/wheel-env
wheel: .venv/wheel.done
	rm -rf dist $(WHEEL_ENV)
	$(BIN)/python -m build -o dist .
	$(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/pip install -q --no-compile "$(TORCH)"
	$(WHEEL_ENV)/bin/pip install -q --no-compile dist/*.whl
	cd $(WHEEL_ENV) && bin/metarec-fast doctor && bin/metarec-fast demo --out demo

clean:
	rm -rf .venv build metarec_fast/_C*.so *.egg-info

# torch comes first and pinned, so that no later step swaps it for another build
.venv/torch.done:
	$(PYTHON) -m venv .venv
	$(INSTALL) "$(TORCH)"
	@touch $@

.venv/tools.done: .venv/torch.done pyproject.toml
	$(INSTALL) $(BUILD_TOOLS)
	@touch $@

.venv/base.done: .venv/tools.done $(BUILD_INPUTS)
	$(INSTALL) --no-build-isolation -e .
	@touch $@

# what an extra names, beside the package that is installed: nothing is compiled again
.venv/test.done: .venv/base.done
	$(INSTALL) "metarec-fast[test]"
	@touch $@

.venv/wheel.done: .venv/torch.done
	$(INSTALL) build
	@touch $@

.venv/lint.done: .venv/base.done
	$(INSTALL) "metarec-fast[lint]"
	@touch $@

.venv/bench.done: .venv/base.done
	$(INSTALL) "metarec-fast[bench]"
	@touch $@
