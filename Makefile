# `make demo` and `make test` need a Python >= 3.12 and a package index; everything else they install.
PYTHON ?= $(shell command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
# Bytecode is written even where the caller's environment forbids it: without, every process that imports
# LeRobot compiles all of it anew, for longer than many a test takes.
RUN := HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin
ARGS ?=
# Imported once at set-up, which writes their bytecode. uv writes none, and each process of the first command
# would spend some 25 s on it.
IMPORTED := trimtab.recipes.cli.demo, lerobot.policies.factory, lerobot.datasets.lerobot_dataset, metaworld
# Test processes, each on one thread; `make test WORKERS=0` runs all in one. The files go to them in the order
# of their names but for conftest.py's: xdist would keep those of few tests, among them the longest, for last,
# and one core idle. Three on two cores: one waits for a robot's clock or a process while two compute.
WORKERS ?= 3

.PHONY: demo test lint format lock clean

demo: $(VENV)/.ready
	$(RUN)/trimtab demo $(ARGS)

test: $(VENV)/.ready
	$(RUN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-report= $(ARGS)
	@echo "coverage: $$($(VENV)/bin/coverage report --format=total) % of the source lines"

# mypy names a module after its folders, so the link gives them their package's name.
lint: $(VENV)/.ready
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/trimtab
	cd $(VENV)/types && ../bin/mypy --config-file ../../pyproject.toml

format: $(VENV)/.ready
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

# The locked versions (all of them: the lock is complete), then this project on top of them.
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "trimtab needs Python 3.12 or newer; found $$($(PYTHON) --version). Name one: make PYTHON=/path/to/python3.12"; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	test -x $(VENV)/bin/uv || $(VENV)/bin/python -m pip install --quiet uv
	VIRTUAL_ENV=$(VENV) $(VENV)/bin/uv pip install --quiet --no-deps --require-hashes -r requirements.lock
	VIRTUAL_ENV=$(VENV) $(VENV)/bin/uv pip install --quiet --no-deps -e .
	$(RUN)/python -c "import $(IMPORTED)"
	touch $@

# Versions and hashes only: no index address belongs in the repository.
lock:
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.12 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --extra dev pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .coverage*
