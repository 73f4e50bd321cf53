# OOM Tracer. `make help` lists the targets; V=1 shows the commands.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

ifeq ($(V),1)
Q :=
say = @:
else
Q := @
say = @printf '  %-8s %s\n'
endif

GO ?= $(shell command -v go || echo /usr/local/go/bin/go)
# What Go's tools and our scripts start is looked for on PATH, go itself by gotestsum and staticcheck.
ifeq ($(shell command -v go),)
export PATH := $(PATH):/usr/local/go/bin
endif
CLANG ?= clang
# What libbpf's headers call the architecture.
TARGET_amd64 := x86
TARGET_arm64 := arm64
# Another one (make ARCH=arm64) is cross-compiled, which needs a tree where nothing else was built.
ARCH := $(shell $(GO) env GOARCH)
HOST_ARCH := $(shell $(GO) env GOHOSTARCH)
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/oom-tracer
ifeq ($(ARCH),$(HOST_ARCH))
LIBBPF := $(CACHE)/libbpf-bookworm-backports
else
LIBBPF := $(CACHE)/libbpf-bookworm-backports-$(ARCH)
GNU_arm64 := aarch64
GNU_amd64 := x86_64
export ARCH
export GOARCH := $(ARCH)
export CGO_ENABLED := 1
export CC := $(GNU_$(ARCH))-linux-gnu-gcc
emulator := qemu-$(GNU_$(ARCH))-static
endif
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
REVISION := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
DATE := $(shell git show -s --format=%cd --date=format:%Y%m%d 2>/dev/null || echo 00000000)
CONFIG ?= config.yaml

# All programs and tools are compiled in one way, so that Go's build cache has each package once: paths do not count, and
# net and os/user are the same with and without cgo. A -tags of a command replaces this one. Tests leave go vet to make lint:
# it would look at each dependency once more for each way of testing.
tags := netgo,osusergo
export GOFLAGS := $(filter-out -trimpath -vet=% -tags=%,$(shell $(GO) env GOFLAGS)) -trimpath -vet=off -tags=$(tags)

# libbpf, libelf and zlib are linked statically: the binary needs glibc and nothing else.
export CGO_CFLAGS := -I$(LIBBPF)/usr/include
# The linker flags name a directory that is there only after the set-up, so they are found late.
link_flags = -L$(shell echo $(LIBBPF)/usr/lib/*-linux-gnu) -Wl,-Bstatic -lbpf -lelf -lz -Wl,-Bdynamic
obs := github.com/oom-tracer/oom-tracer/go/internal/obs
go_tool = $(GO) tool -modfile=tools/go.mod
# The headers of Linux 7 have members of the kind that -fms-extensions is for.
clang_bpf = $(CLANG) -g -O2 -Wall -Werror -target bpf -mcpu=v2 -fms-extensions -Wno-microsoft-anon-tag -D__TARGET_ARCH_$(TARGET_$(ARCH)) -Ivmlinux/$(ARCH) -isystem $(LIBBPF)/usr/include
go_build = CGO_LDFLAGS='$(link_flags)' $(GO) build -ldflags '-s -w -X $(obs).version=$(VERSION) -X $(obs).revision=$(REVISION)'

GO_FILES := $(wildcard go/internal/*/*.html) $(shell find go -name '*.go' -not -name '*_test.go' -not -path 'go/descheduler/*') go.mod go.sum
# A module of its own; see its go.mod.
DESCHEDULER_FILES := $(shell find go/descheduler -name '*.go' -not -name '*_test.go') go/descheduler/go.mod go/descheduler/go.sum
BPF_FILES := $(wildcard src/*.c src/*.h) vmlinux/$(ARCH)/vmlinux.h
OBJECT := go/internal/loader/oom.bpf.o
C_FILES := $(wildcard src/*.c src/*.h tools/*.c tools/node/*.c)
SH_FILES := $(shell git ls-files '*.sh' .ci/run 2>/dev/null)

##@ Use

.PHONY: run
run: build ## trace this machine's OOM kills (needs root); with KUBECONFIG set, annotate its pods too
	$(Q)exec tools/run.sh $(CONFIG)

.PHONY: demo
demo: build ## cause one contained OOM kill and see it come back out of NATS (needs root)
	$(Q)exec build/oom-tracer selftest --config $(CONFIG)

.PHONY: demo-cluster
demo-cluster: build build/hog build/kube build/oom-descheduler ## one contained OOM kill on a cluster of its own, from the kernel to the eviction, with times (needs root)
	$(Q)OOM_TEST_BUILD=$(CURDIR)/build $(GO) test -tags demo,$(tags) -count=1 -timeout 5m -run '^TestDemoCluster$$' -v ./go/cmd/oom-annotator

.PHONY: doctor
doctor: build ## what this kernel and this user can do
	$(Q)exec build/oom-tracer doctor --config $(CONFIG)

##@ Build

.PHONY: build
build: build/oom-tracer build/oom-annotator build/oom-auth build/oom-notify build/oom-tap build/kubectl-oom build/kubectl_complete-oom ## build the BPF object and the binaries into build/

.PHONY: deps
deps: build/.deps ## install what a build needs (Debian packages; libbpf into the cache)

build/.deps: tools/install-deps.sh tools/fetch-deb.sh
	@mkdir -p build
	@tools/install-deps.sh $(LIBBPF)
	@touch $@

# The program is built once per architecture and relocated to the running kernel when it is loaded.
# Its own debugging information goes, its BTF and symbols stay.
$(OBJECT): $(BPF_FILES) build/.deps
	$(say) BPF $@
	$(Q)$(clang_bpf) -c src/oom.bpf.c -o $@
	$(Q)llvm-strip -g $@

build/oom-tracer: $(GO_FILES) $(OBJECT)
	$(say) GO $@
	$(Q)$(go_build) -o $@ ./go/cmd/oom-tracer

# Without cgo, and so static.
build/oom-tap build/kubectl-oom build/oom-annotator build/oom-auth build/oom-notify: build/%: $(GO_FILES)
	@mkdir -p build
	$(say) GO $@
	$(Q)CGO_ENABLED=0 $(go_build) -o $@ ./go/cmd/$*

# kubectl finds its plugins on PATH by their names.
build/kubectl_complete-oom: tools/kubectl_complete-oom
	@mkdir -p build
	$(Q)cp $< $@

.PHONY: matched
matched: build/static/oom-tracer ## the program fits the kernel whose BTF is KERNEL_BTF
	@tools/install-deps.sh $(LIBBPF) $(emulator:%=%=qemu-user-static)
	$(Q)$(emulator) $< doctor --btf $(KERNEL_BTF)

.PHONY: descheduler
descheduler: build/oom-descheduler ## build the descheduler with our plugin (2 to 4 minutes the first time)

# Its own version has the form that the descheduler reads its minor version from (pkg/version), to hold it against
# the cluster's.
build/oom-descheduler: $(GO_FILES) $(DESCHEDULER_FILES)
	@mkdir -p build
	$(say) GO $@
	$(Q)cd go/descheduler && upstream=$$($(GO) list -m -f '{{.Version}}' sigs.k8s.io/descheduler) && \
		CGO_ENABLED=0 $(GO) build -ldflags "-s -w -X $(obs).version=$(VERSION) -X $(obs).revision=$(REVISION) \
		-X sigs.k8s.io/descheduler/pkg/version.version=v$(DATE)-$$upstream" -o $(CURDIR)/$@ ./cmd/oom-descheduler

build/hog: tools/hog.c build/.deps
	$(say) CC $@
	$(Q)$(if $(emulator),$(CC),gcc) -O2 -Wall -Wextra -Werror -static -pthread $< -o $@

##@ Images

# IMAGE_ARCH=arm64 is cross-compiled. BASE is pulled unless it is here; make base-image makes one.
IMAGE_ARCH ?= $(HOST_ARCH)
IMAGE_PREFIX ?= localhost/
IMAGE_TAG ?= $(VERSION)
BASE ?= debian:bookworm
image_env = CONTAINER_TOOL='$(CONTAINER_TOOL)' ARCH=$(IMAGE_ARCH) PREFIX='$(IMAGE_PREFIX)' TAG='$(IMAGE_TAG)' BASE='$(BASE)' \
	KERNEL_BTF='$(KERNEL_BTF)' VERSION='$(VERSION)' REVISION='$(REVISION)' DATE='$(DATE)' GO='$(GO)' CACHE='$(CACHE)'

.PHONY: image
image: ## build the images (CONTAINER_TOOL=, IMAGE_ARCH=, BASE=, IMAGE_PREFIX=, IMAGE_TAG=; KERNEL_BTF=file: for that kernel)
	$(Q)$(image_env) tools/image/build.sh

.PHONY: base-image
base-image: ## make localhost/debian:bookworm, for networks where BASE cannot be pulled (needs root)
	$(Q)$(image_env) tools/image/base.sh

.PHONY: image-index
image-index: ## build the images for amd64 and arm64, both under one name, NAME:TAG-index (needs podman or buildah)
	$(Q)$(image_env) tools/image/index.sh

RELEASE_DIR ?= build/release-$(VERSION)
.PHONY: release
release: ## the last commit: images as OCI archives, chart, manifests, oom-tap and kubectl-oom for each system, krew manifest, SBOMs, provenance, checksums (RELEASE_DIR=, IMAGES=none)
	$(Q)$(image_env) IMAGES='$(IMAGES)' OBS=$(obs) tools/release.sh $(RELEASE_DIR)

.PHONY: check-btf
check-btf: build/static/oom-tracer ## on which of the kernels whose BTF is in the directory DIR the program loads, and with what (ARCH=arm64)
	@tools/install-deps.sh $(LIBBPF) $(emulator:%=%=qemu-user-static)
	$(Q)$(emulator) $< doctor --btf $(or $(DIR),$(error DIR= names a directory with the BTF of kernels))

.PHONY: test-image
test-image: BASE := localhost/debian:bookworm
test-image: build/hog base-image image ## run the images on this kernel, with the capabilities of the manifest and a real OOM kill (needs root)
	@tools/install-deps.sh $(LIBBPF) capsh=libcap2-bin readelf=binutils pgrep=procps
	$(Q)$(image_env) tools/image/test.sh build/hog

##@ Test

.PHONY: test-parts
test-parts: build build/hog build/nats-server build/nats build/krew build/alertmanager build/kube build/deploy build/oom-descheduler build/descheduler build/consumers # what the tests run
	@tools/install-deps.sh $(LIBBPF) chromium

# A tracer sees every kill of the machine, and the tests count: packages with kills wait for each other (oomtest.Alone).
# RERUN=1: what failed runs once more, and is named.
.PHONY: test
test: test-parts verify-goldens ## every test, with real OOM kills in cgroups that the tests make (needs root)
	$(Q)status=0; export OOM_TEST_BUILD=$(CURDIR)/build; \
	CGO_LDFLAGS='$(link_flags)' $(go_tool) gotestsum --format pkgname --jsonfile build/test.json --packages ./... $(RERUN:%=--rerun-fails=%) -- \
		-race -count=1 -p 2 -timeout 40m || status=1; \
	cd go/descheduler; $(GO) tool -modfile=../../tools/go.mod gotestsum --format pkgname --jsonfile ../../build/test-descheduler.json \
		--packages ./... $(RERUN:%=--rerun-fails=%) -- -race -count=1 -p 1 -timeout 20m || status=1; \
	cd ../..; tools/no-skips.sh build/test.json build/test-descheduler.json && exit $$status

# Those that need no API server and no browser.
.PHONY: quick
quick: build build/hog build/nats-server build/alertmanager ## unit tests and contained kills, without Kubernetes: the loop for a change (needs root)
	$(Q)CGO_LDFLAGS='$(link_flags)' OOM_TEST_BUILD=$(CURDIR)/build $(go_tool) gotestsum --format pkgname -- -short -count=1 -p 4 -timeout 10m \
		$$($(GO) list -f '{{.ImportPath}} {{.TestImports}} {{.XTestImports}}' ./go/... | grep -v '/internal/kubetest\|/internal/nodetest' | cut -d' ' -f1)

.PHONY: test-descheduler
test-descheduler: build/oom-descheduler build/descheduler build/kube ## our descheduler and the unmodified one alone (part of make test)
	$(Q)cd go/descheduler && OOM_TEST_BUILD=$(CURDIR)/build $(GO) tool -modfile=../../tools/go.mod \
		gotestsum --format pkgname --jsonfile ../../build/test-descheduler.json -- -count=1 ./...
	$(Q)tools/no-skips.sh build/test-descheduler.json

.PHONY: test-faults
test-faults: build/faults/oom-tracer ## the selftest finds each wrong field that is put into the BPF program (needs root)
	$(Q)tools/test-faults.sh $<

# The commit before the journal was laid out anew. Its tracer is built in the cache, once.
BEFORE := e4174ef
before = $(CACHE)/tracer-$(BEFORE)/oom-tracer
$(before): build/.deps
	$(say) GO '$@ (of $(BEFORE))'
	$(Q)rm -rf $(@D).tmp && mkdir -p $(@D).tmp && git archive $(BEFORE) | tar -xC $(@D).tmp
	$(Q)$(MAKE) --no-print-directory -C $(@D).tmp build/oom-tracer VERSION=$(BEFORE) REVISION=$(BEFORE)
	$(Q)mkdir -p $(@D) && mv $(@D).tmp/build/oom-tracer $@ && rm -rf $(@D).tmp

.PHONY: test-upgrade
test-upgrade: build build/hog build/nats-server $(before) ## a tracer takes over from one of before, and that one from it (needs root and the history of git)
	$(Q)CGO_LDFLAGS='$(link_flags)' OOM_TEST_BUILD=$(CURDIR)/build OOM_TEST_BEFORE=$(before) \
		$(GO) test -tags upgrade,$(tags) -count=1 -timeout 5m -run '^TestUpgrade$$' -v ./go/internal/agent

# A build for the tests: the program with the faults of src/faults.bpf.h in it, in the place of the real
# one.
build/faults/oom.bpf.o: $(BPF_FILES) build/.deps
	@mkdir -p $(@D)
	$(say) BPF $@
	$(Q)$(clang_bpf) -DOOM_FAULTS -c src/oom.bpf.c -o $@
	$(Q)llvm-strip -g $@
	$(Q)echo '{"Replace": {"$(CURDIR)/$(OBJECT)": "$(CURDIR)/$@"}}' >build/faults/overlay.json

build/faults/oom-tracer: $(GO_FILES) $(OBJECT) build/faults/oom.bpf.o
	$(say) GO $@
	$(Q)CGO_LDFLAGS='$(link_flags)' $(GO) build -tags faults,$(tags) -overlay build/faults/overlay.json -o $@ ./go/cmd/oom-tracer

# Static builds run in a machine that has nothing else. The tests of the tag vm are for such machines only.
static_flags = -L$(shell echo $(LIBBPF)/usr/lib/*-linux-gnu) -lbpf -lelf -lz
static_ldflags = -s -w -X $(obs).version=$(VERSION) -X $(obs).revision=$(REVISION) -linkmode external -extldflags -static

build/static/oom-tracer: $(GO_FILES) $(OBJECT)
	$(say) GO $@
	$(Q)CGO_LDFLAGS='$(static_flags)' $(GO) build -ldflags '$(static_ldflags)' -o $@ ./go/cmd/oom-tracer

# The tests that put faults into the program have a build with that program.
build/static/vm-faults.test: build/faults/oom.bpf.o
vm_tags.vm-faults := ,faults
vm_flags.vm-faults := -overlay build/faults/overlay.json
vm_tags.vm-sidebyside := ,sidebyside
build/static/%.test: $(GO_FILES) $(wildcard go/internal/agent/*_test.go) $(OBJECT)
	@mkdir -p $(@D)
	$(say) GO $@
	$(Q)CGO_LDFLAGS='$(static_flags)' $(GO) test -c -tags vm$(vm_tags.$*),$(tags) $(vm_flags.$*) -ldflags '$(static_ldflags)' -o $@ ./go/internal/agent

# oom-tap and hog are static as they are.
VM_TEST_BINARY ?= build/static/vm.test
vm_programs = build/static/vm-faults.test build/static/oom-tracer build/oom-tap build/hog
vm_qemu_amd64 = qemu-system-x86_64=qemu-system-x86
vm_qemu_arm64 = qemu-system-aarch64=qemu-system-arm
vm_deps = $(vm_qemu_$(ARCH)) /var/lib/dpkg/info/busybox-static.list=busybox-static cpio

.PHONY: vm-parts
vm-parts: $(VM_TEST_BINARY) $(vm_programs) # what the next ones boot, and with what
	@tools/install-deps.sh $(LIBBPF) $(vm_deps)

.PHONY: test-vm
test-vm: vm-parts ## the tests of the tag vm on stock Debian kernels in QEMU (KERNELS="6.12 7.2", KERNEL=vmlinuz, ARCH=arm64)
	$(Q)CACHE=$(CACHE) ARCH=$(ARCH) tools/vm/test-vm.sh $(VM_TEST_BINARY) $(vm_programs)
	$(Q)$(if $(KERNEL)$(emulator),,$(MAKE) --no-print-directory test-vm-annotate)

build/sidebyside/sidebyside: $(wildcard tools/sidebyside/*) vmlinux/$(ARCH)/vmlinux.h build/.deps
	@mkdir -p $(@D)
	$(say) GO $@
	$(Q)tools/sidebyside/build.sh $(@D) $(clang_bpf)

# One machine at a time, for the delays. The kernel's log has the size that it has on a stock node.
.PHONY: side-by-side
side-by-side: build/static/vm-sidebyside.test build/static/oom-tracer build/oom-tap build/hog build/sidebyside/sidebyside ## the same kills seen by OOM Tracer and by what else there is, in QEMU, into deploy/docs/comparison.md (KERNELS="6.1 6.12")
	@tools/install-deps.sh $(LIBBPF) $(vm_deps)
	$(Q)CACHE=$(CACHE) OUT=build/side-by-side KERNELS='$(or $(KERNELS),6.1 6.12)' BOOTS='$(or $(BOOTS),v2 v1)' JOBS=1 LOG_BUF=128K TIMEOUT=$(or $(TIMEOUT),1800) RUN='^TestVMSideBySide$$' \
		tools/vm/test-vm.sh build/static/vm-sidebyside.test build/static/oom-tracer build/oom-tap build/hog $(addprefix build/sidebyside/,sidebyside kernel-monitor.json trace_oomkill.bpf.o)
	$(Q)$(call this_machine,In a virtual machine,qemu) >build/side-by-side/machine
	$(compare)

# The same with a real kubelet: what the status of a container and the node's Events say.
.PHONY: side-by-side-node
side-by-side-node: node-images ## the same on a real node, beside what Kubernetes itself says, into deploy/docs/comparison.md (needs root)
	@mkdir -p build
	$(Q){ $(call this_machine,On a real node,qemu); $(node_env) $(GO) test -tags node,sidebyside,$(tags) $(node_flags) -timeout 1h -run '^TestSideBySide$$' -v ./go/internal/nodetest; } | tee build/side-by-side-node.new
	$(Q)mv build/side-by-side-node.new build/side-by-side-node.log
	$(compare)

.PHONY: side-by-side-burst
side-by-side-burst: build/oom-tracer build/oom-tap build/hog build/sidebyside/sidebyside ## 1,000 kills in a cgroup of this machine, faster than an emulated one makes them, into deploy/docs/comparison.md (needs root)
	@tools/install-deps.sh $(LIBBPF) ip=iproute2
	$(Q){ $(call this_machine,On a machine without emulation); unshare --net -- tools/sidebyside/burst.sh $(CURDIR)/build; } | tee build/side-by-side-burst.new
	$(Q)mv build/side-by-side-burst.new build/side-by-side-burst.log
	$(compare)

this_machine = printf 'SIDE \nSIDE \043\043\043 $(1)\nSIDE \nSIDE %s, OOM Tracer %s, %s%s with %d processors.\n' $$(date -I) '$(VERSION)' \
	"$(if $(2),QEMU $$(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9.]*[0-9]\).*/\1/p') without KVM on )" "$$(sed -n '/^model name/s/.*: //p' /proc/cpuinfo | head -n 1)" $$(nproc)
# Of whole runs: one that failed has ended before.
compare = $(Q)table=$$(sed -n 's/^SIDE //p' $$(ls -U build/side-by-side/machine build/side-by-side/*/*/output.log build/side-by-side-{burst,node}.log 2>/dev/null)) && \
	sed -i '/^<!-- /q' deploy/docs/comparison.md && printf '%s\n' "$$table" >>deploy/docs/comparison.md

# Of two runs of the same boot the later directory counts.
KERNEL_RESULTS ?= build/vm
.PHONY: kernels
kernels: ## write what runs of test-vm found (KERNEL_RESULTS="DIR...", each an OUT) into deploy/docs/kernels.md
	$(Q)table=$$(tools/vm/table.sh $(KERNEL_RESULTS)) && sed -i '/^<!-- /q' deploy/docs/kernels.md && printf '\n%s\n' "$$table" >>deploy/docs/kernels.md

# arm64 is slow in the emulator: one kernel, with the tier that is chosen there.
vm_ci_amd64 = KERNELS='5.10 newest'
vm_ci_arm64 = KERNELS=6.12 BOOTS=v2 RUN='^TestVM(Auto|Journal.*|HooksAlone|Tracer)?$$/^fentry$$'

.PHONY: test-vm-ci
test-vm-ci: vm-parts ## a part of it: 5.10 and the newest only, without test-vm-annotate: test-node has more of it (ARCH=arm64: 6.12)
	$(Q)CACHE=$(CACHE) ARCH=$(ARCH) $(vm_ci_$(ARCH)) tools/vm/test-vm.sh $(VM_TEST_BINARY) $(vm_programs)

# Runs on this machine, and boots others.
.PHONY: test-vm-annotate
test-vm-annotate: build build/static/oom-tracer build/hog build/nats-server build/kube ## a part of test-vm: kills in QEMU, global ones too, mark the pods of a real API server
	@tools/install-deps.sh $(LIBBPF) $(vm_deps)
	$(Q)kernels=$$(CACHE=$(CACHE) tools/vm/kernels.sh) && OOM_TEST_BUILD=$(CURDIR)/build OOM_TEST_KERNELS="$$kernels" \
		$(go_tool) gotestsum --format testname --jsonfile build/test-vm-annotate.json -- -tags vm,$(tags) -count=1 -timeout 20m -run '^TestVM$$' ./go/cmd/oom-annotator
	$(Q)tools/no-skips.sh build/test-vm-annotate.json

node_deps = debootstrap /usr/share/containers/seccomp.json=golang-github-containers-common ip=iproute2 mkfs.ext4=e2fsprogs qemu-system-x86_64=qemu-system-x86 /var/lib/dpkg/info/busybox-static.list=busybox-static cpio xz=xz-utils
node_parts = build/kube build/kube-node build/deploy build/nats-server build/coredns build/pod build/node build/oom-tap build/kubectl-oom

node_env = OOM_TEST_BUILD=$(CURDIR)/build OOM_TEST_TAG='$(IMAGE_TAG)' CGO_ENABLED=0
# The test runs in a new network namespace: servers on loopback, and the address of the node.
node_flags = -count=1 -exec 'unshare --net --'

# The images are those of make image. containerd finds them on a separate disk.
.PHONY: node-images
node-images: BASE := localhost/debian:bookworm
node-images: $(node_parts) base-image image
	@tools/install-deps.sh $(LIBBPF) $(node_deps)
	$(Q)$(image_env) tools/node/images.sh build/node build/node-images.img '$(IMAGE_TAG)' build/nats-server build/coredns build/pod

.PHONY: test-node
test-node: node-images ## a cluster of one real node (QEMU, containerd, kubelet) with the chart: from real kills to the pods that replace their victims (needs root)
	$(Q)$(node_env) $(go_tool) gotestsum --format standard-verbose --jsonfile build/test-node.json -- -tags node,$(tags) $(node_flags) -timeout 40m ./go/internal/nodetest
	$(Q)tools/no-skips.sh build/test-node.json

.PHONY: bench-node
bench-node: node-images ## the same cluster: 20 kills of each kind, from the kernel to the replacement, as a table (needs root)
	$(Q)$(node_env) $(GO) test -tags node,bench,$(tags) $(node_flags) -timeout 3h -run '^TestBench$$' -v ./go/internal/nodetest

.PHONY: demo-node
demo-node: node-images ## the same cluster for people: one kill as it happens, then a look around until Ctrl-C (needs root)
	$(Q)$(node_env) $(GO) test -tags node,demo,$(tags) $(node_flags) -timeout 12h -run '^TestDemo$$' -v ./go/internal/nodetest

.PHONY: bench
bench: build build/hog ## latency, loss and cost over at least 1,000 real kills (needs root)
	$(Q)CGO_LDFLAGS='$(link_flags)' OOM_TEST_BUILD=$(CURDIR)/build \
		$(GO) test -tags bench,$(tags) -count=1 -p 1 -timeout 20m -run TestBench -v ./go/internal/loader ./go/internal/agent

.PHONY: chaos
chaos: build build/hog build/nats-server build/kube $(before) ## real kills while all parts fail at random: SEEDS=10 times KILLS=10000 (SEED=first, FAULTS=a,b; needs root and the history of git); the table is build/chaos.md
	$(Q)OOM_TEST_BUILD=$(CURDIR)/build OOM_TEST_SEEDS=$(or $(SEEDS),10) OOM_TEST_KILLS=$(or $(KILLS),10000) OOM_TEST_BEFORE=$(before) \
		$(if $(SEED),OOM_TEST_SEED=$(SEED)) OOM_TEST_FAULTS=$(FAULTS) $(GO) test -count=1 -timeout 6h -run '^TestChaos$$' -v ./go/cmd/oom-annotator

# Where nothing of it can harm this machine.
.PHONY: chaos-vm
chaos-vm: build build/static/oom-tracer build/hog build/nats-server build/kube ## the same in QEMU: nodes out of memory, clocks stepped, nodes reset (SEED=, BOOTS=3, KILLS=40 a boot; KERNELS=6.12)
	@tools/install-deps.sh $(LIBBPF) $(vm_deps) mkfs.ext4=e2fsprogs
	$(Q)kernel=$$(CACHE=$(CACHE) KERNELS=$(or $(KERNELS),6.12) tools/vm/kernels.sh) && OOM_TEST_BUILD=$(CURDIR)/build OOM_TEST_KERNELS="$$kernel" \
		OOM_TEST_SEED=$(SEED) OOM_TEST_BOOTS=$(BOOTS) OOM_TEST_KILLS=$(KILLS) $(GO) test -tags vm,$(tags) -count=1 -timeout 2h -run '^TestVMChaos$$' -v ./go/cmd/oom-annotator

.PHONY: soak
soak: build build/hog build/nats-server build/kube ## HOURS=2 (or MINUTES=) of kills, faults and rolls: memory, goroutines, files, pins and JetStream stay flat, into build/soak.md (needs root)
	$(Q)OOM_TEST_BUILD=$(CURDIR)/build OOM_TEST_VERSION='$(VERSION)' OOM_TEST_MINUTES=$(or $(MINUTES),$(shell expr 60 \* $(or $(HOURS),2))) \
		$(GO) test -tags soak,$(tags) -count=1 -timeout 26h -run '^TestSoak$$' -v ./go/cmd/oom-annotator

.PHONY: bench-annotate
bench-annotate: build build/hog build/kube ## from 1,000 real kills to the annotation, CPU time of a kill and of an idle minute, decisions a second, memory at 150,000 pods and at 10,000 real ones (needs root)
	$(Q)OOM_TEST_BUILD=$(CURDIR)/build \
		$(GO) test -tags bench,$(tags) -count=1 -timeout 20m -run 'TestBench(Memory|Latency|CPU|Idle|RealPods)' -v ./go/cmd/oom-annotator

.PHONY: bench-top
bench-top: build build/kube ## oom-tap top, report and pod, and oom-annotator explain, over 1,000,000 stored messages: time, CPU, memory (takes 2 GiB of disk)
	$(Q)OOM_TEST_BUILD=$(CURDIR)/build \
		$(GO) test -tags bench,$(tags) -count=1 -timeout 30m -run TestTopMillion -v ./go/internal/tap

.PHONY: bench-scale
bench-scale: build build/hog build/nats-server build/kube build/deploy ## CONNECTIONS=10000 tracers on three NATS servers: logins, STORM=1000 nodes with KILLS=10 each, all lose NATS; oom-annotator with PODS=10000, SIMULATED="150000 500000"; MESSAGES=1000000 read; into build/scale.md
	$(Q)GO=$(GO) TAGS=$(tags) CONNECTIONS=$(CONNECTIONS) STORM=$(STORM) KILLS=$(KILLS) PODS=$(PODS) SIMULATED='$(SIMULATED)' MESSAGES=$(MESSAGES) \
		tools/bench-scale.sh

.PHONY: bench-loop
bench-loop: build build/hog build/kube build/oom-descheduler ## from real kills to the eviction, with the descheduler's interval out and in (needs root)
	$(Q)OOM_TEST_BUILD=$(CURDIR)/build \
		$(GO) test -tags bench,$(tags) -count=1 -timeout 20m -run TestBenchLoop -v ./go/cmd/oom-annotator

# What a script has built in the user's cache, once, and where this target finds it.
cached = $(Q)mkdir -p build && built=$$($(1)) && ln -sfnT "$$built" $@

build/nats-server: go.mod tools/build-module.sh tools/cache.sh
	$(call cached,tools/build-module.sh . github.com/nats-io/nats-server/v2)

# The command with which an administrator backs up streams.
build/nats: tools/nats/go.mod tools/build-module.sh tools/cache.sh
	$(call cached,tools/build-module.sh tools/nats github.com/nats-io/natscli nats)

# Whom oom-notify sends to in the tests.
build/alertmanager: tools/alertmanager/go.mod tools/alertmanager/build.sh tools/cache.sh
	$(call cached,tools/alertmanager/build.sh)

# Installs the plugin from its manifest.
build/krew: tools/krew/go.mod tools/build-module.sh tools/cache.sh
	$(call cached,tools/build-module.sh tools/krew sigs.k8s.io/krew cmd/krew)

# The examples of consumers: the one in Go, and the npm packages of the one in Node.js.
build/consumers: $(wildcard deploy/examples/consumers/*) tools/consumers.sh $(GO_FILES)
	@tools/install-deps.sh $(LIBBPF) node=nodejs npm python3=python3
	@mkdir -p build/consumers
	$(Q)packages=$$(tools/consumers.sh) && ln -sfn "$$packages/node_modules" $@/node_modules
	$(Q)CGO_ENABLED=0 $(GO) build -o $@/consumer ./deploy/examples/consumers
	@touch $@

# The unmodified one, for the tests.
build/descheduler: go/descheduler/go.mod tools/build-module.sh tools/cache.sh
	$(call cached,RELEASED=1 tools/build-module.sh go/descheduler sigs.k8s.io/descheduler cmd/descheduler)

# A directory with kube-apiserver and etcd, of the module tools/kube, and one with the rest of a cluster.
build/kube build/kube-node: tools/kube/go.mod tools/kube/build.sh tools/cache.sh
	$(call cached,tools/kube/build.sh $(filter node,$(subst -, ,$@))) && touch $@

build/coredns: tools/node/go.mod tools/build-module.sh tools/cache.sh
	$(call cached,tools/build-module.sh tools/node github.com/coredns/coredns)

build/pod: tools/node/pod.c build/.deps
	$(say) CC $@
	$(Q)gcc -O2 -Wall -Wextra -Werror -static $< -o $@

# A directory with the disk and the kernel of a node.
build/node: build/kube-node tools/node/root.sh tools/node/init.sh $(shell find tools/node/files -type f 2>/dev/null)
	@tools/install-deps.sh $(LIBBPF) $(node_deps)
	$(call cached,tools/node/root.sh "$$(readlink -f build/kube-node)") && touch $@

# A directory with helm, promtool and CRDs, of the module tools/deploy.
build/deploy: tools/deploy/go.mod tools/deploy/build.sh tools/cache.sh
	$(call cached,tools/deploy/build.sh) && touch $@

.PHONY: test-deploy
test-deploy: build build/hog build/nats-server build/nats build/krew build/kube build/deploy build/oom-descheduler ## the chart, manifests, NATS permissions, alerts and dashboard alone (part of make test)
	$(Q)OOM_TEST_BUILD=$(CURDIR)/build $(go_tool) gotestsum --format pkgname --jsonfile build/test-deploy.json -- -race -count=1 ./go/internal/deploy
	$(Q)tools/no-skips.sh build/test-deploy.json

# Those of tests that a machine or a cluster is made for.
all_tags := bench,demo,node,sidebyside,soak,upgrade,vm,$(tags)
.PHONY: lint
lint: $(OBJECT) ## go vet, gofmt, staticcheck, clang-format, shellcheck
	@tools/install-deps.sh $(LIBBPF) clang-format shellcheck
	$(say) LINT gofmt
	$(Q)unformatted=$$($(shell $(GO) env GOROOT)/bin/gofmt -l go tools); test -z "$$unformatted" || { echo "$$unformatted" >&2; exit 1; }
	$(say) LINT 'go vet'
	$(Q)CGO_LDFLAGS='$(link_flags)' $(GO) vet -tags $(all_tags) ./...
	$(Q)CGO_LDFLAGS='$(link_flags)' $(GO) vet -tags faults,$(tags) ./go/internal/loader
	$(Q)cd go/descheduler && CGO_ENABLED=0 $(GO) vet ./...
	$(say) LINT staticcheck
	$(Q)CGO_LDFLAGS='$(link_flags)' $(go_tool) staticcheck -tags $(all_tags) ./...
	$(Q)CGO_LDFLAGS='$(link_flags)' $(go_tool) staticcheck -tags faults,$(tags) ./go/internal/loader
	$(Q)cd go/descheduler && CGO_ENABLED=0 $(GO) tool -modfile=$(CURDIR)/tools/go.mod staticcheck ./...
	$(say) LINT 'go generate'
	$(Q)cd go/descheduler/removeannotated && $(GO) tool deepcopy-gen --output-file ../../../build/_deepcopy.go . && \
		diff -u zz_generated.deepcopy.go ../../../build/_deepcopy.go
	$(say) LINT strings
	$(Q)$(GO) run tools/strings/main.go >build/strings
	$(say) LINT clang-format
	$(Q)clang-format --dry-run --Werror $(C_FILES)
	$(say) LINT shellcheck
	$(Q)shellcheck $(SH_FILES)

build/golangci-lint: tools/golangci/go.mod tools/build-module.sh tools/cache.sh
	$(call cached,tools/build-module.sh tools/golangci github.com/golangci/golangci-lint/v2 cmd/golangci-lint)

# Not a part of lint: CI would build it for minutes.
golangci = $(CURDIR)/build/golangci-lint run --config $(CURDIR)/.golangci.yml
.PHONY: golangci
golangci: $(OBJECT) build/golangci-lint ## golangci-lint with the linters of .golangci.yml (some minutes to build, once)
	$(Q)CGO_LDFLAGS='$(link_flags)' $(golangci) --build-tags $(all_tags) ./go/...
	$(Q)CGO_LDFLAGS='$(link_flags)' $(golangci) --build-tags faults,$(tags) ./go/internal/loader
	$(Q)cd go/descheduler && CGO_ENABLED=0 $(golangci) ./...

.PHONY: strings
strings: ## list every log message, error, help and alert, and fail on words that readers stumble over
	$(Q)$(GO) run tools/strings/main.go

.PHONY: check-deps
check-deps: $(OBJECT) ## the arrows between the packages point down; libbpf is the tracer's, client-go the annotator's; nobody's the descheduler
	$(Q)without() { \
		deps=$$(CGO_LDFLAGS='$(link_flags)' $(GO) list -deps ./go/cmd/$$1); \
		! grep -E "$$2|descheduler" <<<"$$deps" || { echo "$$1 must not need these" >&2; exit 1; }; \
	}; \
	without oom-tap 'libbpfgo|nats-server|client-go/(kubernetes|tools/portforward)'; \
	without kubectl-oom 'libbpfgo|nats-server'; \
	without oom-tracer client-go; \
	without oom-annotator 'libbpfgo|nats-server|internal/loader'; \
	without oom-auth 'libbpfgo|nats-server|internal/loader'; \
	without oom-notify 'libbpfgo|nats-server|internal/loader|client-go'
	$(Q)deps=$$($(GO) list -deps ./go/event); \
		test "$$(grep '\.' <<<"$$deps" | grep -vc '^github.com/go-json-experiment/json')" = 1 || { echo 'go/event must need the standard library and encoding/json/v2 only' >&2; exit 1; }

.PHONY: fuzz
fuzz: $(OBJECT) build/kube build/deploy ## run every fuzz target for FUZZTIME (30s), and count executions: here and in all (RUN=regexp, KEEP=1: keep short inputs in testdata)
	$(Q)CGO_LDFLAGS='$(link_flags)' OOM_TEST_BUILD=$(CURDIR)/build GO='$(GO)' FUZZTIME='$(FUZZTIME)' RUN='$(RUN)' KEEP='$(KEEP)' tools/fuzz.sh $(CACHE)/fuzz-executions

##@ Generated files

vmlinux_deps = bpftool zstd lz4 xz=xz-utils
vmlinux_from = BTF='$(BTF)' KERNEL_IMAGE='$(KERNEL_IMAGE)' SUITE='$(SUITE)'

.PHONY: vmlinux
vmlinux: ## make vmlinux/<arch>/vmlinux.h from the running kernel, BTF=file, KERNEL_IMAGE=file or SUITE=bookworm-backports
	@tools/install-deps.sh $(LIBBPF) $(vmlinux_deps)
	$(Q)$(vmlinux_from) tools/vmlinux.sh $(ARCH) vmlinux/$(ARCH)

.PHONY: verify-vmlinux
verify-vmlinux: ## the headers in vmlinux/ are what the kernels named beside them make
	@tools/install-deps.sh $(LIBBPF) $(vmlinux_deps)
	$(Q)for arch in amd64 arm64; do VERIFY=1 STALE_OK='$(STALE_OK)' tools/vmlinux.sh $$arch vmlinux/$$arch; done

.PHONY: manifests
manifests: ## make the schema of config in deploy/chart from the Go types, and render deploy/chart into deploy/manifests
	$(Q)CGO_ENABLED=0 $(GO) test ./go/internal/config -run '^TestValuesSchema$$' -update
	$(Q)tools/deploy/manifests.sh deploy/manifests

.PHONY: verify-manifests
verify-manifests: ## deploy/manifests is what deploy/chart renders, and the schema of config is that of the Go types
	$(Q)CGO_ENABLED=0 $(GO) test ./go/internal/config -run '^TestValuesSchema$$'
	$(Q)mkdir -p build && rm -rf build/manifests && tools/deploy/manifests.sh build/manifests
	$(Q)diff -r deploy/manifests build/manifests

.PHONY: update-goldens
update-goldens: build/goldens $(OBJECT) ## write go/internal/wire/testdata anew: the records by C, what they become by Go
	$(Q)$< go/internal/wire/testdata
	$(Q)CGO_ENABLED=0 $(GO) test ./go/internal/wire -run TestGoldens -update

.PHONY: verify-goldens
verify-goldens: build/goldens ## the golden records are what the C header makes
	$(Q)mkdir -p build/goldens.d && $< build/goldens.d
	$(Q)for f in build/goldens.d/*; do cmp "$$f" "go/internal/wire/testdata/$${f##*/}"; done

build/goldens: tools/goldens.c src/oom_event.h build/.deps
	$(say) CC $@
	$(Q)gcc -O2 -Wall -Wextra -Werror $< -o $@

.PHONY: clean
clean: ## remove what was built (the cache stays: rm -r $(CACHE))
	rm -rf build $(OBJECT)

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-zA-Z_-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' Makefile
