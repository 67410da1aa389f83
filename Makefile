# Two commands do everything on a fresh machine (Python 3.11+, gcc, make): `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

KERNEL_TESTS := $(wildcard $(addprefix tests/,$(addsuffix .py,$(addprefix ops/test_,adamw attention dispatch flash fused linear nf4 norm packed paged q4 sampler sampling sparse varlen) \
	models/test_native models/test_encoder serve/test_native_runner serve/test_adapters)))
NATIVE := CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/kernels/*.cpp)

.PHONY: demo test test-slow test-sanitize lint docs bench clean

demo: $(READY)  ## plan, chat, serve, fine-tune, evaluate, chat again on the default model (SHORT=1: fewer steps)
	$(BIN)/python demo/demo.py $(if $(SHORT),--short)

test: $(READY)  ## the whole fast suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(READY)  ## only the slow checks; write their results down in benchmarks/
	$(BIN)/python -m pytest --slow -m slow $(ARGS)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check src tests benchmarks demo
	$(BIN)/mypy

docs: $(READY)  ## the generated pages of docs/
	$(BIN)/python -m lilliput.cli.reference

bench: $(READY)  ## make bench X=decode_vs_transformers
	$(BIN)/python benchmarks/$(X).py $(ARGS)

test-sanitize: $(READY)  ## the kernel tests under AddressSanitizer and UBSan, with a build of their own
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DLILLIPUT_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/sanitize
	LILLIPUT_NATIVE="$$(ls build/sanitize/_native*.so)" OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest $(KERNEL_TESTS) -k "not citizen" -p no:cacheprovider $(ARGS)

$(READY): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs
