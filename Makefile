# What a fresh Debian machine lacks for a target, the target installs with apt.
# All targets work as root, and otherwise through sudo.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

# sudo drops Go from PATH, and ordinary users have no sbin in theirs.
export PATH := $(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin
export CGO_ENABLED := 0

PREFIX ?= /usr/local
DESTDIR ?=

# git refuses the work tree of another user, root's for instance.
GIT := git -c safe.directory='*'
VERSION := $(shell $(GIT) describe --tags --match 'v[0-9]*' --dirty 2>/dev/null || \
	echo "devel-$$($(GIT) describe --always --dirty 2>/dev/null)" | sed 's/-$$//')

# For others than root: tests are built as the user and run as root.
TESTEXEC := $(if $(filter 0,$(shell id -u)),,-exec "'$(CURDIR)/scripts/as-root'")

## build: bin/dispatcher, the command
.PHONY: build
build: have-go
	@go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o bin/dispatcher ./cmd/dispatcher

## demo: show what it does, in network namespaces of its own
.PHONY: demo
demo: have-root build
	@scripts/need ip:iproute2
	@scripts/as-root bin/dispatcher demo

## test: all tests on this kernel, those with concurrency with the race detector too
.PHONY: test
test: have-root have-go
	@scripts/need ip:iproute2
	@scripts/need bpftool:bpftool groff:groff-base || echo 'going on without: tests that need it will fail'
	@if scripts/need gcc:gcc /usr/include/stdlib.h:libc6-dev; then \
		echo 'with the race detector:'; \
		export CGO_ENABLED=1; \
		go test $(TESTEXEC) -race -count=1 -timeout 10m -run Concurrent ./... | { grep -v -e 'no test files' -e 'no tests to run' || true; }; \
		go test $(TESTEXEC) -race -count=1 -timeout 10m ./internal/testenv; \
	else \
		echo 'going on without the race detector: it needs gcc'; \
	fi
	@echo 'all tests:'
	@go test $(TESTEXEC) -count=1 -timeout 15m ./...

## lint: gofmt, go vet, staticcheck, govulncheck, go mod tidy
.PHONY: lint
lint: have-go
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "gofmt would change:"; echo "$$unformatted"; exit 1; }
	go vet ./...
	go tool staticcheck ./...
	scripts/vulncheck
	go mod tidy -diff

## generate: compile the BPF programs again; fails if that changes what is committed
.PHONY: generate
generate: have-go
	@scripts/need clang-19:clang-19 llvm-strip-19:llvm-19
	go generate ./...
	@if ! $(GIT) rev-parse HEAD >/dev/null 2>&1; then \
		echo 'not compared with what is committed: this is not a git work tree'; \
	elif changed=$$($(GIT) status --porcelain -- '*.o' '*_bpfel.go' '*_bpfeb.go') && [ -n "$$changed" ]; then \
		printf '%s\n' "$$changed" 'this differs from what is committed: commit it with its sources'; \
		exit 1; \
	fi

## install: the command, its manual page and completion, below PREFIX (/usr/local) and DESTDIR
.PHONY: install
install: build
	install -D -m 0755 bin/dispatcher '$(DESTDIR)$(PREFIX)/bin/dispatcher'
	bin/dispatcher man | install -D -m 0644 /dev/stdin '$(DESTDIR)$(PREFIX)/share/man/man8/dispatcher.8'
	bin/dispatcher completion bash | install -D -m 0644 /dev/stdin '$(DESTDIR)$(PREFIX)/share/bash-completion/completions/dispatcher'

## clean: remove what was built
.PHONY: clean
clean:
	rm -rf bin

## help: this list
.PHONY: help
help:
	@sed -n 's/^## \([a-z]*\): /  make \1\t/p' Makefile | expand -t 18

.PHONY: have-go
have-go:
	@command -v go >/dev/null || { echo 'Go is missing, in PATH and in /usr/local/go: install Go 1.26 or newer, see go.dev/dl'; exit 1; }
	@[ -d "$$(go env GOMODCACHE)/cache/download" ] || scripts/need /etc/ssl/certs/ca-certificates.crt:ca-certificates

.PHONY: have-root
have-root:
	@[ "$$(id -u)" = 0 ] || sudo true || { echo 'this needs root, and sudo does not give it: please become root'; exit 1; }
