# DRC: what developers do often. The comment behind ## is the help.

.DEFAULT_GOAL := help
.PHONY: help build demo test test-deps lint fuzz minio minio-3 minio-build ci clean

# How long each fuzz target runs.
FUZZTIME ?= 1m
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

test-deps: ## install (as root) or name the programs that the tests need
	@internal/tools/test-deps.sh

lint: ## run the linters, package boundaries among them
	@test -z "$$(gofmt -l . | tee /dev/stderr)" || { echo 'run gofmt -w on these files' >&2; exit 1; }
	go mod tidy -diff
	internal/tools/lint.sh

fuzz: ## fuzz every decoder, FUZZTIME=1m each
	@for package in $$(go list ./...); do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "$$package $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$package || exit 1; \
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
