# Each of `make demo` and `make test` does all of its own set-up on a fresh Debian 12 machine: packages, toolchain, build.
SHELL := /bin/bash -o pipefail
GO    := .ci/go

# The agent travels to every node: one static file, without symbols.
AGENT_FLAGS := -trimpath -ldflags='-s -w'

.PHONY: build demo test lint bench clean

build: ## both programs, in bin/
	@.ci/packages build
	CGO_ENABLED=0 $(GO) build -o bin/troupe ./cmd/troupe
	CGO_ENABLED=0 $(GO) build $(AGENT_FLAGS) -o bin/troupe-agent ./cmd/troupe-agent

demo: ## three blank machines boot, change role by a push, and change back
	@.ci/packages demo
	@$(MAKE) --no-print-directory build
	bin/troupe demo

# -p 2: packages beside each other, as the machine has cores; the lab's tests boot machines and want them.
test: ## everything, the lab's tests in QEMU included
	@.ci/packages test
	@$(MAKE) --no-print-directory build
	$(GO) vet ./...
	$(GO) test -p 2 -timeout 45m ./...
	$(GO) test -race -short -p 2 -timeout 30m $$($(GO) list ./... | grep -v /testbed)

lint: ## what go vet does not see
	@.ci/packages build
	$(GO) run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.11.0 run ./...

bench: ## a report, no verdict
	@.ci/packages test
	@$(MAKE) --no-print-directory build
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 60m ./...

clean:
	rm -rf bin
