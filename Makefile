# The commands of this repository. `make` alone lists them.
#
# Everything that links RocksDB goes through ops/deps/with-rocksdb, which installs what its build needs (or says what to
# install), compiles it once for all profiles and targets, and keeps it outside of target/.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

WITH  := ops/deps/with-rocksdb
# In a pipeline a stale Cargo.lock is an error; at a desk cargo may bring it up to date.
LOCK  := $(if $(CI),--locked,)
BIN   := target/release
# The tests of the API, which run once more over each way that is not the fastest one of this host.
API   := put_get regions namespaces leases tenants room events restart
# Where `make test` leaves the whole log of the tests.
LOG   := target/test.log

# A trace for `make run` (see `kvkeep-bench replay --help` for the formats); none: a seeded multi-turn workload.
TRACE ?=
# More flags for `make run`: make run ARGS='--json out.json'
ARGS  ?=

.PHONY: help
help: ## This list
	@printf 'KVKeep\n\n'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\n  make run TRACE=file.jsonl.zst   replays a real trace\n'

.PHONY: build
build: ## The release binaries: kvkeepd, kvkeepctl, kvkeep-bench
	@printf 'kvkeep: building the release binaries (a few minutes the first time) ...\n' >&2
	@started=$$SECONDS; $(WITH) cargo build --release $(LOCK) -p kvkeep-node -p kvkeep-ctl -p kvkeep-bench --bins && \
	  printf 'kvkeep: built in %s s\n' "$$((SECONDS - started))" >&2

.PHONY: run
run: build ## One node, a multi-turn workload with durable sessions, kill -9 half-way, and the account
	@$(BIN)/kvkeep-bench main $(if $(TRACE),--trace "$(TRACE)") $(ARGS)

.PHONY: test
test: ## Format, lints, documentation, every test
	@$(MAKE) fmt
	@$(MAKE) clippy
	@$(MAKE) doc
	@$(MAKE) unit
	@$(MAKE) python

.PHONY: fmt
fmt: ## Is the source formatted? (cargo fmt mends it)
	@printf 'kvkeep: format\n' >&2
	@cargo fmt --all --check

.PHONY: clippy
clippy: ## Lints; a warning is an error
	@printf 'kvkeep: lints\n' >&2
	@$(WITH) cargo clippy --workspace --all-targets $(LOCK) -- -D warnings

.PHONY: doc
doc: ## Documentation; a warning is an error
	@printf 'kvkeep: documentation\n' >&2
	@RUSTDOCFLAGS='-D warnings' $(WITH) cargo doc --workspace --no-deps $(LOCK)

.PHONY: unit
unit: ## Every Rust test (dev profile)
	@printf 'kvkeep: tests\n' >&2
	@mkdir -p $(dir $(LOG))
	@$(WITH) cargo build --workspace --bins $(LOCK)
	@status=0; $(WITH) cargo test --workspace --no-fail-fast $(LOCK) 2>&1 | tee $(LOG) || status=$$?; \
	  for way in grpc port; do \
	    printf 'kvkeep: the API once more, over %s\n' "$$way" >&2; \
	    KVKEEP_TEST_WAY=$$way $(WITH) cargo test --workspace --test node --no-fail-fast $(LOCK) -- $(API) 2>&1 | tee -a $(LOG) || status=$$?; \
	  done; \
	  awk '/^test result:/ { passed += $$4; failed += $$6; ignored += $$8 } \
	       END { printf "\nkvkeep: all Rust tests: %d passed, %d failed, %d ignored\n", passed, failed, ignored }' $(LOG); \
	  exit $$status

.PHONY: python
python: ## The Python package, and stock gRPC from Python, against a node
	@$(WITH) cargo build --workspace $(LOCK)
	@python/tests/run.sh
	@tests/python/run.sh

# Other programs than those of `make build`: make wheel PROGRAMS=folder
PROGRAMS ?=

.PHONY: wheel
wheel: ## One wheel for Python: module, connectors, kvkeepd and kvkeepctl
	@$(if $(PROGRAMS),,$(MAKE) build)
	@PROGRAMS="$(or $(PROGRAMS),$(BIN))" python/wheel.sh

# ENGINES: what tests/engines/run takes; none: every test. `make test-engines ENGINES=bench` writes docs/benchmarks-engines.json.
ENGINES ?=

.PHONY: test-engines
test-engines: build wheel ## Real engines on the store: makes their environment (7 GB), then half an hour of tests
	@tests/engines/run $(ENGINES)

# Each prints its floor and its figures; their flags and defaults stand at the head of their files.
EXAMPLES := kvkeep-core/directory_cost kvkeep-tiers/arena_cost kvkeep-node/index_open kvkeep-tiers/device_bench \
            kvkeep-bench/generator_speed kvkeep-raft/appends

.PHONY: bench
bench: build ## The measured bars: gRPC against a bare service, match, peers, and the benches beside the code
	@$(BIN)/kvkeep-bench grpc
	@$(BIN)/kvkeep-bench match
	@$(BIN)/kvkeep-bench peers
	@for example in $(EXAMPLES); do \
	  printf '\nkvkeep: %s\n' "$$example" >&2; \
	  $(WITH) cargo run --quiet --release $(LOCK) -p "$${example%/*}" --example "$${example#*/}"; \
	done
