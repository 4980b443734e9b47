# Everything a person needs is three words: make demo, make test, make install.
PYTHON ?= python3
# The pinned torch is the CPU build where such a wheel is at hand. Elsewhere, name what you want:
#   make install TORCH="torch==2.13.0 --index-url INDEX"   with the index PyTorch's installation page gives
TORCH ?= torch==2.13.0
# DeepSpeed is built here, from its source. Leave it out with: make install DEEPSPEED=
DEEPSPEED ?= deepspeed>=0.19.8
VENV := .venv
BIN := $(VENV)/bin
# On a machine that others use too, threads that spin while they wait cost more than they gain: see the README.
export OMP_WAIT_POLICY ?= PASSIVE
# Tests start many processes, and each would compile the package anew where an environment keeps bytecode from the disk.
unexport PYTHONDONTWRITEBYTECODE

# Tests share the cores out among themselves, one thread each. One at a time: make test PYTEST_WORKERS=0
PYTEST_WORKERS ?= logical
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --maxprocesses 4 --dist worksteal

.PHONY: install demo test test-all azure coverage check format promises notebooks docs docs-check bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Gatewright needs Python 3.11 or later; found " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'
	@echo "[1/4] virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/4] $(TORCH)"
	@$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	@echo "[3/4] gatewright with everything its tests and recipes use"
	@$(BIN)/python -m pip install --disable-pip-version-check --editable '.[train,dev,notebooks]'
	@echo "[4/4] $(DEEPSPEED)"
	@test -z "$(DEEPSPEED)" || { \
		$(BIN)/python -m pip install --disable-pip-version-check setuptools wheel ninja && \
		$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation "$(DEEPSPEED)"; \
	} || echo "warning: DeepSpeed could not be built, and --engine deepspeed will not work; all else is installed."
	@touch $@

demo: install
	@$(BIN)/gatewright train digits

test: install
	@$(PYTEST) -m "not slow"

test-all: install azure
	@$(PYTEST)

# Azure's own package, which checks its job in deploy/. It wants other versions than MLflow does, so it lives apart.
azure: $(VENV)/azure/.installed

$(VENV)/azure/.installed: | install
	@$(BIN)/python -m venv $(VENV)/azure
	@$(VENV)/azure/bin/python -m pip install --disable-pip-version-check --quiet azure-ai-ml
	@touch $@

# The tests of the core alone, and that they reach every line and branch of it.
CORE_TESTS := tests/test_*.py tests/contracts tests/dispatch tests/experts tests/layers tests/ops tests/parity tests/routers
coverage: install
	@$(PYTEST) -q $(CORE_TESTS) --cov=gatewright --cov-report=term-missing:skip-covered --cov-fail-under=100

check: install
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_imports.py

format: install
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

promises: install
	@$(BIN)/python -m tests.promises

# Every command and every example of the documents, on a small budget; each with its exit status and its time.
docs-check: install
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.documents

# The documentation site, in build/site. Its pages lie where they lie in the repository, so that their links hold in both.
PAGES := README.md CHANGELOG.md CONTRIBUTING.md LICENSE deploy docs examples notebooks src studies tests
docs: install
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[docs]'
	@rm -rf build/pages && mkdir -p build/pages && cp -R $(PAGES) build/pages
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# On the digits, or on CIFAR-10: make notebooks GATEWRIGHT_CIFAR10=FOLDER; GATEWRIGHT_EPOCHS=1 is a short look.
notebooks: install
	@$(BIN)/python notebooks/execute.py

# The benchmark of docs/benchmarks.md, on a GPU where there is one: about a quarter of an hour on an idle machine.
BENCH := $(BIN)/python -m benchmarks
bench: install
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[bench]'
	@$(BENCH)
	@$(BENCH) --profile
	@$(BENCH).images
	@$(BENCH).scaling
	@$(BENCH).steps
	@$(BENCH).page

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
