# Perdure's make targets. Everything works from a clean clone on Debian 12 or
# newer that has Go >= 1.26; `setup` brings the rest.
SHELL       := /bin/bash
GO          ?= go
VERSION     := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS     := -s -w -X main.version=$(VERSION)
TESTFLAGS   ?=
BENCHFLAGS  ?=
SOAKFLAGS   ?=
LABDIR      ?=
export CGO_ENABLED := 0

.PHONY: all setup build test test-unit bench soak lint demo clean
all: build

## setup: install by apt what is missing (as root; does nothing when nothing is missing)
setup:
	@GO='$(GO)' scripts/setup.sh

## build: bin/perdure, bin/perdure-guest (the program inside the demo guest)
build:
	@GO='$(GO)' scripts/setup.sh --go-only
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/perdure ./cmd/perdure-guest

## test: everything, with real QEMU in the lab (as root); a test that cannot run is a failure
test: setup build
	$(GO) vet -tags bench,soak ./...
	PERDURE_TEST_NOSKIP=1 $(GO) test -timeout 15m -parallel 4 $(TESTFLAGS) $$($(GO) list ./... | grep -v '/e2e$$')
	PERDURE_TEST_NOSKIP=1 $(GO) test -p 1 -count 1 -timeout 70m $(TESTFLAGS) ./e2e

## test-unit: what needs neither root nor QEMU
test-unit:
	@GO='$(GO)' scripts/setup.sh --go-only
	$(GO) test -short -timeout 10m $(TESTFLAGS) $$($(GO) list ./... | grep -v '/e2e$$')

## bench: measure; a table on the terminal and bench/results/*.json (as root)
bench: setup build
	PERDURE_TEST_NOSKIP=1 $(GO) test -p 1 -count 1 -timeout 120m -v -tags bench -run '^TestBench' ./e2e -args -bench-out '$(CURDIR)/bench/results' $(BENCHFLAGS)

## soak: long runs and the guest with a real distribution (as root)
soak: setup build
	@GO='$(GO)' scripts/setup.sh --soak
	PERDURE_TEST_NOSKIP=1 $(GO) test -count 1 -timeout 6h -v -tags soak -run '^TestSoak' ./internal/shim -args $(SOAKFLAGS)
	PERDURE_TEST_NOSKIP=1 $(GO) test -p 1 -count 1 -timeout 12h -v -tags soak -run '^TestSoak' ./e2e -args $(SOAKFLAGS)

## lint: golangci-lint of the version named in tools/go.mod
lint:
	$(GO) tool -modfile=tools/go.mod golangci-lint run ./...

## demo: a guest outlives the power-off of its host, live on the terminal (as root; KEEP=1 leaves the lab up)
demo: setup build
	bin/perdure lab demo $(if $(LABDIR),--dir '$(LABDIR)')

clean:
	rm -rf bin dist
