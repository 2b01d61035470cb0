# Steward. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PROTOS := $(wildcard protos/steward/v1/*.proto)
SERVICE_PROTOS := $(wildcard protos/steward/v1/*_service.proto)
BENCH_VENV := .venv-bench
PEERS  := tests/load/peers
ETCDPB := registry_service/store/etcdpb
GO     ?= $(shell command -v go || echo /usr/local/go/bin/go)
# For `make run ARGS="--port 8090"` and `make test ARGS="tests/unit -k epoch"`.
ARGS   ?=
# For `make simulate SEED=7 N=1 TRACE=1 WITHOUT=fence`.
SEED   ?= 1
N      ?= 200
TRACE  ?=
WITHOUT ?=
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Without python3-venv there is no ensurepip: the venv is made bare and filled from outside.
$(VENV)/.made: requirements.lock requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "steward: Python 3.11 or newer is needed; set PYTHON=python3.11")'
	@$(PYTHON) -m pip --version >/dev/null || { echo "steward: $(PYTHON) has no pip; install python3-pip" >&2; exit 1; }
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(PY) install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock -r requirements-dev.lock
	$(PYTHON) -m pip --python $(PY) install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

steward/v1/.made: $(PROTOS) $(VENV)/.made
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m grpc_tools.protoc -I protos --python_out=. --mypy_out=quiet:. $(PROTOS)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m grpc_tools.protoc -I protos --grpc_python_out=. --mypy_grpc_out=quiet:. $(SERVICE_PROTOS)
	@touch $@

$(ETCDPB)/.made: protos/etcd/steward_etcd.proto $(VENV)/.made
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m grpc_tools.protoc -I protos/etcd --python_out=$(ETCDPB) --mypy_out=quiet:$(ETCDPB) $<
	@touch $@

.PHONY: env proto run test lint format lock peers bench etcd failover rolling observe simulate model clean
env: $(VENV)/.made steward/v1/.made $(ETCDPB)/.made ## Make the environment in .venv from the lock files

proto: steward/v1/.made $(ETCDPB)/.made ## Generate code from protos/

run: env ## Start the whole cluster on this machine
	@exec $(VENV)/bin/steward up $(ARGS)

test: env ## Run all tests
	$(PY) -m pytest $(ARGS)

lint: env ## Check style, types and import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: env ## Format the code
	$(VENV)/bin/ruff check --fix --quiet .
	$(VENV)/bin/ruff format .

simulate: env ## Play seeds of the simulation: SEED=first N=how many WITHOUT=guard
	$(PY) -m steward.testing --seed $(SEED) --count $(N) $(if $(TRACE),--trace) $(if $(WITHOUT),--without $(WITHOUT))

# A second server for the tests of the registry's store, beside the one that is installed. All of
# it is built here from modules that go.sum names by their digests.
.etcd/etcd: $(wildcard tests/etcd/*.go tests/etcd/go.*)
	cd tests/etcd && $(GO) build -mod=readonly -trimpath -buildvcs=false -ldflags "-s -w" -o $(CURDIR)/$@ .

etcd: .etcd/etcd ## Build the newer etcd that tests use too (needs Go; two minutes)
	@$< --version

# What an edge is compared with. Nothing of it is ever part of the product or of its tests.
$(BENCH_VENV)/.made: requirements-bench.lock
	$(PYTHON) -m venv --without-pip $(BENCH_VENV)
	$(PYTHON) -m pip --python $(BENCH_VENV)/bin/python install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-bench.lock
	@touch $@

$(PEERS)/node_modules/.made: $(PEERS)/package-lock.json $(PEERS)/.npmrc
	cd $(PEERS) && npm ci --ignore-scripts --no-progress
	@touch $@

peers: $(BENCH_VENV)/.made $(PEERS)/node_modules/.made ## Install what `make bench` compares with

bench: env ## Measure everything on this machine: ARGS=--quick
	@$(MAKE) --no-print-directory --keep-going peers || echo "steward: a peer can't be installed; the table will say which" >&2
	@$(PY) -m tests.load.bench $(ARGS)

failover: env ## Kill nodes under load and measure the pause: ARGS="--kills 200"
	$(PY) -m tests.load.failover $(ARGS)

rolling: env ## Restart all nodes under load and measure the pause
	$(PY) -m tests.load.rolling $(ARGS)

observe: env ## Start Prometheus beside `make run`: ARGS="--data .steward --port 9090"
	@exec $(PY) -m steward.testing.observe $(ARGS)

model: ## Check the model of ownership with SPIN
	@$(PYTHON) docs/model/check.py $(ARGS)

lock: $(VENV)/.made ## Resolve the lock files anew
	$(VENV)/bin/pip-compile --quiet --strip-extras --generate-hashes --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-header --output-file requirements.lock pyproject.toml
	$(VENV)/bin/pip-compile --quiet --strip-extras --generate-hashes --allow-unsafe --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-header --constraint requirements.lock --extra dev --output-file requirements-dev.lock pyproject.toml
	$(VENV)/bin/pip-compile --quiet --strip-extras --generate-hashes --allow-unsafe --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-header --constraint requirements.lock --extra bench --output-file requirements-bench.lock pyproject.toml
	cd $(PEERS) && npm install --package-lock-only --no-progress

clean: ## Remove the environment, generated code and caches
	rm -rf $(VENV) $(BENCH_VENV) $(PEERS)/node_modules .etcd build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find steward/v1 $(ETCDPB) -type f ! -name __init__.py -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
