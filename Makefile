# Every target sets up what it needs; nothing has to be installed first but Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exporting is single-threaded Python: one worker per core, one thread each, whole files so that fixtures are shared.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: help demo test check accept fix bench gpu clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# The stamps are redone when the dependencies change.
$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[hf]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed ## compress the bundled model and show what it costs
	$(BIN)/jettison demo

test: $(VENV)/.installed-dev ## run every test (under 10 minutes on two cores)
	$(PYTEST)

check: $(VENV)/.installed-dev ## tests, format, lint and types: what continuous integration runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/check_types.py
	$(PYTEST)

fix: $(VENV)/.installed-dev ## format and lint what can be fixed automatically
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

accept: $(VENV)/.installed-dev ## rewrite golden files; look at the diff before committing it
	$(BIN)/python -m pytest --snapshot-update

bench: $(VENV)/.installed-dev ## measure and write benchmarks/results: make bench TEXT=file (minutes; run alone)
	$(BIN)/python benchmarks/quality.py --text '$(TEXT)'
	$(BIN)/python benchmarks/compile_cost.py

# With the Python of the machine: nothing is installed, no plugin of the other tests is needed.
gpu: ## test and measure the kernels on this machine's GPU: make gpu PYTHON=python3
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest --confcutdir=tests/gpu -o filterwarnings=default \
		tests/gpu tests/codegen/test_triton_kernels.py tests/codegen/test_gather_kernels.py \
		tests/codegen/test_low_rank_kernels.py \
		tests/codegen/test_machine_code.py tests/codegen/test_ahead_of_time.py \
		tests/runtime/test_triton_executor.py tests/runtime/test_recorded_step.py \
		tests/runtime/test_device_weights.py
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu_kernels.py
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu_decode.py
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu_offload.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
