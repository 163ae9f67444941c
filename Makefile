# make setup | demo | test | lint | bench | test-agent | test-system | fuzz | soak | wheel | zipapp | deb: each works from a clean clone.
#
# PYTHON            the host's interpreter, 3.10 or newer
# PIP_ARGS          passed to pip; where pip would fetch a CUDA build of torch, point it at PyTorch's CPU
#                   wheels:  make demo PIP_ARGS="--extra-index-url ADDRESS"
# FUZZ_SECONDS      how long fuzz runs each target
# SOAK_MINUTES      how long soak runs
# AGENT_PYTHONS     the versions that test-agent looks for
# DEB_ARCH          amd64 or arm64: the device that deb and zipapp are for; default: as this machine
# DEB_PYTHON        the device's Python, such as 3.8 on JetPack 5; default: PYTHON's
# DEB_VERSION       of the Debian package; default: the agent's
PYTHON ?= python3
PIP_ARGS ?=
FUZZ_SECONDS ?= 1200
SOAK_MINUTES ?= 10
AGENT_PYTHONS ?= 3.8 3.9 3.10 3.11 3.12 3.13 3.14
PACK_ARGS = $(if $(DEB_ARCH),--arch $(DEB_ARCH)) $(if $(DEB_PYTHON),--python $(DEB_PYTHON)) \
  $(if $(DEB_VERSION),--version $(DEB_VERSION))
VENV := .venv
PACK_VENV := .venv-packaging
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STUBS := $(VENV)/.tensorrt-stubs

.PHONY: setup demo test lint bench test-agent test-system fuzz soak wheel zipapp deb clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt device_agent/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "edgekit needs Python 3.10 or newer; set PYTHON=python3.11" >&2; exit 4; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(PIP_ARGS) -e ./device_agent -e '.[dev]'
	@touch $@

# The types of TensorRT, for mypy.
$(STUBS): $(STAMP) .ci/tensorrt_stubs.py
	rm -f $(VENV)/tensorrt_stubs-*.whl
	$(BIN)/pip download --quiet --no-deps --constraint constraints.txt $(PIP_ARGS) --dest $(VENV) tensorrt-stubs
	$(BIN)/python .ci/tensorrt_stubs.py $(VENV)/tensorrt_stubs-*.whl
	@touch $@

demo: setup
	$(BIN)/edgekit demo

# The agent's tests run in environments of its own only, one of them with the host's Python.
test: setup lint
	$(BIN)/pytest -q --ignore=tests/device_agent --ignore=tests/system
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-agent-3.8 test-agent-3.11

lint: setup $(STUBS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks/*.py benchmarks/gpu/*.py
	$(BIN)/lint-imports

test-agent:
	bash tests/device_agent/run.sh $(AGENT_PYTHONS)

test-agent-%:
	bash tests/device_agent/run.sh $*

# Boots real devices; needs root, debootstrap, systemd-container; for aarch64 qemu-user-static, for a registry
# docker-registry and iproute2.
test-system: setup
	$(BIN)/pytest -q -s --timeout 3600 tests/system

fuzz: setup
	$(BIN)/python tests/fuzz/fuzz_run.py --seconds $(FUZZ_SECONDS)

soak: setup
	$(BIN)/python benchmarks/serving/soak.py --minutes $(SOAK_MINUTES)
	EDGEKIT_OPENAPI_EXAMPLES=300 $(BIN)/pytest -q --timeout 1800 tests/edgekit/test_openapi.py

bench: setup
	@for script in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)) benchmarks/serving/run.py; do \
	  echo "$$script"; $(BIN)/python $$script $(BENCH_ARGS) || status=$$?; done; exit $${status:-0}

# Packages of the agent, in dist/. They need pip's index here, and no network where they are installed.
wheel zipapp deb: $(PACK_VENV)/.installed
	$(PACK_VENV)/bin/python -m device_agent.packaging $@ $(PACK_ARGS)

$(PACK_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(PACK_VENV)
	$(PACK_VENV)/bin/pip install --quiet 'packaging>=23'
	@touch $@

clean:
	rm -rf $(VENV) $(PACK_VENV) dist .venv-agent-* .edgekit edgekit-demo
