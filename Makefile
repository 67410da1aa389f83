# Two commands do everything on a fresh machine (Python 3.11+, gcc, make): `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint docs bench clean

demo: $(READY)  ## plan, chat, fine-tune, evaluate, chat again on the default model (SHORT=1: fewer steps)
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

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs
