# Each of `make demo` and `make test` does all of its own set-up on a fresh Debian 12 machine: packages, toolchain, build.
SHELL := /bin/bash -o pipefail
GO    := .ci/go

VERSION := $(shell git describe --always --dirty 2>/dev/null || echo devel)
STAMP   := -X github.com/troupe-dev/troupe/internal/version.stamped=$(VERSION)
# The agent travels to every node: one static file, without symbols.
AGENT_FLAGS := -trimpath -ldflags='-s -w $(STAMP)'

.PHONY: build demo test lint bench clean

build: ## both programs, in bin/
	@.ci/packages build
	CGO_ENABLED=0 $(GO) build -ldflags='$(STAMP)' -o bin/troupe ./cmd/troupe
	CGO_ENABLED=0 $(GO) build $(AGENT_FLAGS) -o bin/troupe-agent ./cmd/troupe-agent

demo: ## three blank machines boot, change role by a push, and change back
	@.ci/packages demo
	@$(MAKE) --no-print-directory build
	bin/troupe demo

# The race detector slows images/initramfs, which compresses a hundred megabytes and has no goroutine of its own, from one
# minute to five. The lab's machines want the processors for themselves, so what boots a fleet goes last and alone.
test: ## everything, the lab's tests in QEMU included
	@.ci/packages test
	@$(MAKE) --no-print-directory build
	$(GO) vet ./...
	$(GO) test -race -p 2 -timeout 30m $$($(GO) list ./... | grep -v -e /testbed -e /images/initramfs)
	$(GO) test -timeout 20m ./images/initramfs
	$(GO) test -race -p 1 -timeout 45m ./testbed/...

lint: ## what go vet does not see
	@.ci/packages build
	$(GO) run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.11.0 run ./...

bench: ## a report, no verdict
	@.ci/packages bench
	@$(MAKE) --no-print-directory build
	$(GO) test -run '^$$' -bench '^Benchmark(Load|Reload|PushTo.*)$$' -benchtime 3x -timeout 20m ./schema/load ./reconciler | tee bin/bench.txt
	$(GO) test -run '^$$' -bench '^BenchmarkSwitch$$' -benchtime 3x -timeout 40m ./testbed/e2e | tee -a bin/bench.txt
	$(GO) test -run '^$$' -bench '^BenchmarkBuild$$' -benchtime 1x -timeout 20m ./images/build | tee -a bin/bench.txt
	$(GO) test -run '^$$' -bench '^BenchmarkTarget$$' -benchtime 1x -timeout 30m ./netboot/iscsi/conformance | tee -a bin/bench.txt
	@echo; echo '== the report'; grep -E '^(│|Benchmark(Load|Reload))' bin/bench.txt

clean:
	rm -rf bin
