# Every target sets itself up: it makes .venv and installs the project there first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Container images set it; a hundred processes of the tests would each compile all of torch's modules anew.
unexport PYTHONDONTWRITEBYTECODE

# Tests run side by side, each file on one worker of one thread, so that results do not depend on the number of cores.
WORKERS ?= 2
PYTEST := $(BIN)/pytest -p no:benchmark -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo docs quick test test-avx2 ci gpu grid adversarial bench lint wheel clean

demo: $(VENV)/installed
	$(BIN)/lorarecycle demo

# While working: what takes a second or two; no compiler, no export of a whole model.
quick: $(VENV)/installed
	$(PYTEST) -m "not medium and not slow"

# Before a commit: all but what takes minutes.
test: $(VENV)/installed
	$(PYTEST)

# As `test`, on the code paths of a CPU without AVX-512.
test-avx2: $(VENV)/installed
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST)

# All that must pass: style, the wheel by itself, the site, every test but `make grid`; in a browser where Chromium is.
ci: $(VENV)/docs-installed $(VENV)/browser-installed
	$(MAKE) --jobs=2 lint wheel docs
	$(PYTEST) -m "not grid"

# Before a change of a kernel: every one compiled for GPUs in every configuration that can be launched; no GPU needed.
grid: $(VENV)/installed
	$(BIN)/pytest -m "grid or slow" tests/kernels

# Mutated files, kills, many processes, full disks: about half an hour; writes benchmarks/results/reliability.md.
adversarial: $(VENV)/installed
	$(BIN)/python tests/adversarial/reliability.py

# On a machine with a GPU, as it is: no environment is made, nothing is fetched. `make gpu PARTS="tests ops steps job"`.
gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PYTHON) benchmarks/gpu.py $(PARTS)

# The site, into build/site; a warning is an error.
docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/installed
	$(BIN)/pytest benchmarks --benchmark-only

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Builds the wheel, installs it into an environment that has what it declares and nothing else, runs a small job from
# it and type-checks it there.
wheel: $(VENV)/installed
	rm -rf build/lib build/bdist.* dist .wheel-venv
	$(BIN)/python -m build --wheel
	$(PYTHON) -m venv .wheel-venv
	.wheel-venv/bin/python -m pip install --quiet --no-compile --no-deps dist/*.whl
	$(BIN)/python tests/link_requirements.py .wheel-venv
	cd .wheel-venv && bin/python ../tests/smoke_wheel.py
	cd .wheel-venv && ../$(BIN)/mypy --config-file ../pyproject.toml --python-executable bin/python -p lorarecycle

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[test]'
	touch $@

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[docs]'
	touch $@

$(VENV)/browser-installed: $(VENV)/docs-installed
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[browser]'
	touch $@

clean:
	rm -rf $(VENV) .wheel-venv build dist *.egg-info lorarecycle-demo
