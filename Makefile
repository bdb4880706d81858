# Every target sets itself up: it makes .venv and installs the project there first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test grid bench lint types wheel clean

demo: $(VENV)/installed
	$(BIN)/lorarecycle demo

test: $(VENV)/installed
	$(BIN)/pytest

# Compiles every kernel for GPUs in every configuration that can be launched; no GPU needed, minutes long.
grid: $(VENV)/installed
	$(BIN)/pytest -m slow tests/kernels

bench: $(VENV)/installed
	$(BIN)/pytest benchmarks --benchmark-only

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Builds the wheel, installs it into an environment of its own, runs a small job from it and type-checks it there.
wheel: $(VENV)/installed
	rm -rf build dist .wheel-venv
	$(BIN)/python -m build --wheel
	$(PYTHON) -m venv .wheel-venv
	.wheel-venv/bin/python -m pip install --quiet dist/*.whl
	cd .wheel-venv && bin/python ../tests/smoke_wheel.py
	cd .wheel-venv && ../$(BIN)/mypy --config-file ../pyproject.toml --python-executable bin/python -p lorarecycle

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .wheel-venv build dist *.egg-info lorarecycle-demo
