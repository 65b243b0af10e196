# DRC: what developers do often. The comment behind ## is the help.

.DEFAULT_GOAL := help
.PHONY: help build demo test test-deps sim soak lint fuzz minio minio-3 minio-build ci clean

# How long each fuzz target runs.
FUZZTIME ?= 1m
# The first seed that is simulated, and how many.
SEED ?= 1
SEEDS ?= 1000
# How long the soak runs.
MINUTES ?= 10
export PATH := $(PATH):/usr/sbin:/sbin

help: ## show this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build ./bin/drc, a static program
	CGO_ENABLED=0 go build -trimpath -o bin/drc ./cmd/drc

demo: build ## show the whole way of a write and back; DRC_STORE=… uses that store
	./bin/drc demo

test: test-deps minio-build ## run all tests, with the race detector, real NBD clients and real MinIO
	go vet ./...
	go test -race -timeout 30m ./...
	go test -timeout 20m ./internal/sim

test-deps: ## install (as root) or name the programs that the tests need
	@internal/tools/test-deps.sh

sim: ## simulate SEEDS=1000 seeds from SEED=1 on, with PAIRS=1 of two hosts; one alone says all that happens
	go test -timeout 48h -count 1 -v -run '^$(if $(PAIRS),TestTwoHosts,TestSim)$$' ./internal/sim -sim.seed $(SEED) $(if $(PAIRS),-sim.pairs,-sim.seeds) $(SEEDS) $(if $(filter 1,$(SEEDS)),-sim.v)

lint: ## run the linters, package boundaries among them
	@test -z "$$(gofmt -l . | tee /dev/stderr)" || { echo 'run gofmt -w on these files' >&2; exit 1; }
	go mod tidy -diff
	internal/tools/lint.sh

soak: test-deps minio-build ## run real agents, stores and clients through faults, MINUTES=10; SEED=… repeats one
	DRC_SOAK_MINUTES=$(MINUTES) DRC_SEED=$(if $(filter-out file,$(origin SEED)),$(SEED)) go test -race -count 1 -timeout 0 -run '^TestSoak$$' -v ./cmd/drc

fuzz: ## fuzz every decoder, FUZZTIME=1m each
	@for package in $$(go list ./...); do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "$$package $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1s $$package || exit 1; \
		done; \
	done

minio: ## run one MinIO until Ctrl-C and print its URL (builds it the first time)
	minio-dev/minio.sh start 1

minio-3: ## run three MinIOs until Ctrl-C and print their URLs
	minio-dev/minio.sh start 3

minio-build: ## build MinIO, which tests need (about 4 minutes, once)
	minio-dev/minio.sh build

ci: ## what .ci/run does
	.ci/run

clean: ## remove what build made
	rm -rf bin
