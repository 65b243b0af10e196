# DRC: what developers do often. The comment behind ## is the help.

.DEFAULT_GOAL := help
.PHONY: help build minio minio-3 minio-build clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build ./bin/drc, a static program
	CGO_ENABLED=0 go build -trimpath -o bin/drc ./cmd/drc

minio: ## run one MinIO until Ctrl-C and print its URL (builds it the first time)
	minio-dev/minio.sh start 1

minio-3: ## run three MinIOs until Ctrl-C and print their URLs
	minio-dev/minio.sh start 3

minio-build: ## build MinIO, which tests need (about 4 minutes, once)
	minio-dev/minio.sh build

clean: ## remove what build made
	rm -rf bin
