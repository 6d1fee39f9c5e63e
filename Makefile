# On a fresh Debian machine each make target installs with apt what it lacks. All
# targets work as root, or else through sudo. Without both, or where the kernel
# refuses, demo and test run in a virtual machine. VM=7.2 always runs in one.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

# sudo drops Go from PATH, and ordinary users have no sbin in theirs.
export PATH := $(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin
export CGO_ENABLED := 0

PREFIX ?= /usr/local
DESTDIR ?=

# git refuses a work tree of another user, for example root.
GIT := git -c safe.directory='*'
VERSION := $(shell $(GIT) describe --tags --match 'v[0-9]*' --dirty 2>/dev/null || \
	echo "devel-$$($(GIT) describe --always --dirty 2>/dev/null)" | sed 's/-$$//')

DATE := $(shell $(GIT) log -1 --format=%cs 2>/dev/null)

# Users other than root build the tests as themselves and run them as root.
TESTEXEC := $(if $(filter 0,$(shell id -u)),,-exec "'$(CURDIR)/scripts/as-root'")

## build: bin/dispatcher, the command
.PHONY: build
build: have-go
	@go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION) -X main.date=$(DATE)' -o bin/dispatcher ./cmd/dispatcher

# The kernel of the virtual machine (5.10, 6.1, 6.12 or 7.2); empty: run here, if this machine allows it.
VM ?=
ELSEWHERE := $(or $(VM),7.2)
AGAIN := $(MAKE) --no-print-directory

## demo: show what it does, in network namespaces of its own; VM=7.2: in a virtual machine
.PHONY: demo
demo: matrix
	@if scripts/can-run-here '$(VM)'; then \
		exec $(AGAIN) demo-here; \
	else \
		scripts/need $(VM_NEEDS) && exec bin/matrix demo -kernel $(ELSEWHERE); \
	fi

.PHONY: demo-here
demo-here: build
	@scripts/need ip:iproute2
	@scripts/as-root bin/dispatcher demo

## test: all tests on this kernel, tests of goroutines also with the race detector; VM=7.2: in a virtual machine
.PHONY: test
test: matrix
	@if scripts/can-run-here '$(VM)'; then \
		exec $(AGAIN) test-here; \
	else \
		scripts/need $(VM_NEEDS) && exec bin/matrix test -kernel $(ELSEWHERE); \
	fi

# The kernels to test on, comma-separated; empty: all.
KERNEL ?=

## test-kernels: the tests on Debian's kernels 5.10, 6.1, 6.12 and 7.2, in virtual machines; KERNEL=6.12: on one
.PHONY: test-kernels
test-kernels: matrix
	@scripts/need $(VM_NEEDS)
	@bin/matrix test -short -kernel '$(KERNEL)'
	@$(if $(KERNEL),,bin/matrix doc || echo 'the tests passed, but docs/kernels.md was out of date')

## kernels-doc: write docs/kernels.md from the last run of test-kernels
.PHONY: kernels-doc
kernels-doc: matrix
	@bin/matrix doc

# What virtual machines need: see scripts/need.
VM_NEEDS := qemu-system-x86_64:qemu-system-x86 xz:xz-utils apt-get:apt dpkg-deb:dpkg

# The tool for virtual machines. It is built each time, which takes about a second.
.PHONY: matrix
matrix: have-go
	@go build -trimpath -buildvcs=false -o bin/matrix ./internal/matrix

# The packages with tests of goroutines. Linking all packages with the race detector would take half a minute, and in
# tests with many processes it has nothing to see.
GOROUTINES = $$(grep -rl --include='*_test.go' 'func Test[A-Za-z0-9_]*Goroutines' . | xargs -n1 dirname | sort -u)

.PHONY: test-here
test-here: have-go
	@scripts/need ip:iproute2
	@scripts/need bpftool:bpftool groff:groff-base || echo 'the tests that need it will fail'
	@if scripts/need gcc:gcc /usr/include/stdlib.h:libc6-dev; then \
		CGO_ENABLED=1 scripts/go-test 'tests of goroutines, with the race detector' $(TESTEXEC) -race -timeout 15m -run Goroutines $(GOROUTINES); \
	else \
		echo 'without the race detector, which needs gcc'; \
	fi
	@# The longest packages come first.
	@scripts/go-test 'all tests' $(TESTEXEC) -timeout 20m ./test/... ./...

# How long make fuzz runs each target.
FUZZTIME ?= 20s
# Which of them, as an extended regular expression.
FUZZ ?= Fuzz

## fuzz: run each fuzz target for a while; FUZZTIME=5m: for longer; FUZZ=FuzzParse: only these
# By default Go makes each new input smaller for up to a minute, and runs nothing else meanwhile.
.PHONY: fuzz
fuzz: have-go
	@grep -ro --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' . | grep -E '$(FUZZ)' | sort | while IFS=: read -r file name; do \
		name=$${name#func }; \
		echo "$$name in $$(dirname "$$file")"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime '$(FUZZTIME)' -fuzzminimizetime 10x "$$(dirname "$$file")"; \
	done

# The sections of make bench, comma-separated; empty: all.
ONLY ?=

## bench: measure against the other ways: tables, bin/bench.json; ONLY=packet,control: only these sections
.PHONY: bench
bench: build matrix bench-tool
	@scripts/need ip:iproute2 $(VM_NEEDS)
	@scripts/need bpftool:bpftool || echo 'there will be no figures of bpftool'
	@scripts/need xdp-loader:xdp-tools || echo 'there will be no figures of xdp-loader'
	@scripts/as-root bin/bench $(if $(ONLY),-only '$(ONLY)')

## bench-doc: write docs/performance.md from the last make bench
.PHONY: bench-doc
bench-doc: bench-tool
	@bin/bench doc

## bench-check: fail if chains cost more than before: instructions, counted in a virtual machine, and ratios of times
.PHONY: bench-check
bench-check: matrix bench-tool
	@scripts/need $(VM_NEEDS)
	@scripts/as-root bin/bench check

.PHONY: bench-tool
bench-tool: have-go
	@go build -trimpath -buildvcs=false -o bin/bench ./internal/bench

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
		echo 'not compared with the committed files: this is not a git work tree'; \
	elif changed=$$($(GIT) status --porcelain -- '*.o' '*_bpfel.go' '*_bpfeb.go') && [ -n "$$changed" ]; then \
		printf '%s\n' "$$changed" 'these files differ from the committed ones: commit them with their sources'; \
		exit 1; \
	fi

## install: the command, its manual page, completion for bash, zsh and fish, units and udev rule, below PREFIX (/usr/local) and DESTDIR
.PHONY: install
install: build
	install -D -m 0755 bin/dispatcher '$(DESTDIR)$(PREFIX)/bin/dispatcher'
	bin/dispatcher man | install -D -m 0644 /dev/stdin '$(DESTDIR)$(PREFIX)/share/man/man8/dispatcher.8'
	bin/dispatcher completion bash | install -D -m 0644 /dev/stdin '$(DESTDIR)$(PREFIX)/share/bash-completion/completions/dispatcher'
	bin/dispatcher completion zsh | install -D -m 0644 /dev/stdin '$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_dispatcher'
	bin/dispatcher completion fish | install -D -m 0644 /dev/stdin '$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/dispatcher.fish'
	for unit in packaging/*.service; do \
		sed 's|@bindir@|$(PREFIX)/bin|' "$$unit" | install -D -m 0644 /dev/stdin "$(DESTDIR)$(PREFIX)/lib/systemd/system/$${unit##*/}"; \
	done
	install -D -m 0644 packaging/90-dispatcher.rules '$(DESTDIR)$(PREFIX)/lib/udev/rules.d/90-dispatcher.rules'

## clean: remove what was built
.PHONY: clean
clean:
	rm -rf bin

## help: this list
.PHONY: help
help:
	@sed -n 's/^## \([a-z-]*\): /  make \1\t/p' Makefile | expand -t 21

.PHONY: have-go
have-go:
	@command -v go >/dev/null || { echo 'Go is missing, in PATH and in /usr/local/go: install Go 1.26 or newer, see go.dev/dl'; exit 1; }
	@[ -d "$$(go env GOMODCACHE)/cache/download" ] || scripts/need /etc/ssl/certs/ca-certificates.crt:ca-certificates
