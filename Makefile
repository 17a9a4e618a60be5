# make demo | test | portable | native | sanitize | arm | lint | clean. Needs Python 3.11 or newer with venv and a C++ compiler;
# `make arm` names two tools more; everything else comes from PyPI.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: demo test portable native sanitize arm lint format clean

demo: $(VENV)/run.done
	$(BIN)/fate generate -p "What is the capital of France?" --experts 50% -n 40

test: $(VENV)/dev.done
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

# What the native core computes, with the instructions that every processor has.
PORTABLE := tests/gates/test_g1_exact.py tests/gates/test_g9_two_bits.py tests/unit/compute \
  tests/unit/models/test_quantized.py tests/unit/models/test_narrow.py \
  tests/unit/models/test_fused.py tests/unit/models/test_fused_block.py tests/unit/models/test_fused_run.py
portable: $(VENV)/dev.done
	FATE_ISA=portable $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadgroup $(PORTABLE)

# The native core without Python, optimised as it is shipped.
native: $(VENV)/dev.done
	@mkdir -p build
	$(BIN)/cmake -S . -B build/native -DFATE_TESTS=ON -G "Unix Makefiles" > build/native.log
	$(BIN)/cmake --build build/native -j2 >> build/native.log
	build/native/fate_kernels_tests
	build/native/fate_decode_tests
	build/native/fate_io_tests

# The same under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/dev.done
	@mkdir -p build
	$(BIN)/cmake -S . -B build/sanitize -DFATE_TESTS=ON -DFATE_SANITIZE=address,undefined \
	  -DCMAKE_BUILD_TYPE=None -G "Unix Makefiles" > build/sanitize.log
	$(BIN)/cmake --build build/sanitize -j2 >> build/sanitize.log
	build/sanitize/fate_kernels_tests
	build/sanitize/fate_decode_tests
	build/sanitize/fate_io_tests

# The same compiled for ARM and run by an emulator.
arm: $(VENV)/dev.done
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool > /dev/null || { \
	  echo "make arm needs $$tool; on Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 2; }; done
	@mkdir -p build
	CXX=aarch64-linux-gnu-g++ $(BIN)/cmake -S . -B build/arm -DFATE_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_EXE_LINKER_FLAGS=-static -G "Unix Makefiles" > build/arm.log
	$(BIN)/cmake --build build/arm -j2 >> build/arm.log
	qemu-aarch64 build/arm/fate_kernels_tests neon-dotprod
	qemu-aarch64 -cpu cortex-a72 build/arm/fate_kernels_tests portable
	qemu-aarch64 build/arm/fate_decode_tests neon-dotprod
	qemu-aarch64 build/arm/fate_io_tests

lint: $(VENV)/dev.done
	$(BIN)/ruff check src tests scripts
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/dev.done
	$(BIN)/ruff check --fix src tests scripts
	$(BIN)/ruff format src tests scripts

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fate needs Python 3.11 or newer; try make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "fate needs Python's venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.done: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing into $(VENV): a minute or two the first time (PIP_ARGS=-v shows more)"
	$(PIP) -e .
	@touch $@

$(VENV)/dev.done: $(VENV)/run.done
	$(PIP) -e '.[dev]'
	@touch $@
