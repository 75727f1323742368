# make train: a language model learns to sort by RL, on this machine.   make test: every test.
# Both set up what they need in .venv first, once.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
ARGS ?=

NATIVE := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh') setup.py

.PHONY: setup train test test-gpu lint fmt bench docs wheel clean

setup: $(VENV)/.built

# torch first and pinned: the extension is compiled against the torch that is installed.
$(VENV)/.dependencies: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "$(TORCH)" "setuptools>=77" ninja
	$(PY) -m pip install -q $$($(PY) setup.py --print-dependencies)
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(NATIVE)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

train: setup
	$(PY) -m rlkern.train $(ARGS)

test: setup
	$(PY) -m pytest $(ARGS)

test-gpu: setup
	$(PY) -m pytest -m gpu $(ARGS)

lint: $(VENV)/.dependencies
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

fmt: $(VENV)/.dependencies
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

bench: setup
	$(PY) -m pytest bench --benchmark-enable $(ARGS)
	$(PY) -m bench.report

docs: setup
	$(PY) -m bench.report

wheel: $(VENV)/.dependencies
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist *.egg-info rlkern/*.so $(VENV)/.built
