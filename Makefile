# make demo      set everything up and show the main job          make lab      a shell in the lab, with the binaries in PATH
# make test      everything that can be tested quickly            make bench    measure, with the peers in the same run
# make soak      what takes longer                                make install  DESTDIR= PREFIX=/usr/local

PREFIX  ?= /usr/local
DESTDIR ?=
SYSCONFDIR ?= /etc

target    := $(or $(CARGO_TARGET_DIR),target)
binaries  := $(target)/x86_64-unknown-linux-gnu/release
guest     := $(target)/x86_64-unknown-linux-gnu/guest
artifacts := $(target)/artifacts
stage     := $(target)/stage

.PHONY: help demo test soak bench lab install build setup kernel binaries agent faulty-agent guest-image tests images lab-image \
  forky-image stage test-stage clean

# A compiler, a download and a package installation keep different parts of the machine busy, so they run side by side. Cargo and
# the kernel's make count the CPUs themselves: they are not to hear of this make's jobs.
MAKEFLAGS += --jobs=3
unexport MAKEFLAGS MFLAGS

help:
	@sed -n 's/^# //p' Makefile | head -n 3

setup:
	@tests/setup

kernel: setup
	@guest-kernel/build

binaries:
	cargo build --release --locked -p bulkhead -p containerd-shim-bulkhead-v2 -p bulkhead-vmm -p bulkhead-fs -p bulkhead-rootfs-builder

agent: setup
	cargo build --profile guest --locked -p bulkhead-agent
	@install -D $(guest)/bulkhead-agent $(artifacts)/bulkhead-agent

guest-image: binaries agent
	$(binaries)/bulkhead-guest-image --agent $(artifacts)/bulkhead-agent --output $(artifacts)/guest.erofs

build: kernel guest-image

install: build
	install -D -m 755 $(binaries)/bulkhead $(DESTDIR)$(PREFIX)/bin/bulkhead
	install -D -m 755 $(binaries)/containerd-shim-bulkhead-v2 $(DESTDIR)$(PREFIX)/bin/containerd-shim-bulkhead-v2
	install -D -m 755 $(binaries)/bulkhead-vmm $(DESTDIR)$(PREFIX)/libexec/bulkhead/bulkhead-vmm
	install -D -m 755 $(binaries)/bulkhead-fs $(DESTDIR)$(PREFIX)/libexec/bulkhead/bulkhead-fs
	install -D -m 644 $(artifacts)/vmlinux $(DESTDIR)$(PREFIX)/share/bulkhead/vmlinux
	install -D -m 644 $(artifacts)/guest.erofs $(DESTDIR)$(PREFIX)/share/bulkhead/guest.erofs
	test -e $(DESTDIR)$(SYSCONFDIR)/bulkhead/config.toml || \
	  install -D -m 644 sandbox/config.toml $(DESTDIR)$(SYSCONFDIR)/bulkhead/config.toml

tests: binaries
	cargo build --release --locked -p bulkhead-tests

images: setup
	@tests/images/build-busybox >/dev/null
	@tests/images/build-debian >/dev/null

# Without virtualization in the CPU, KVM is not to be had here, and the lab's disk can be made early. Otherwise it is made when needed.
lab-image: setup images
	@grep -qwE 'vmx|svm' /proc/cpuinfo || tests/lab/lab build >/dev/null

# The other lab, with containerd 2.1.
forky-image: lab-image
	@[ "$$(id -u)" != 0 ] || BULKHEAD_LAB_RELEASE=forky tests/lab/lab build >/dev/null

# What the lab gets: an installation and images.
stage: build images lab-image
	@rm -rf $(stage)
	@$(MAKE) --no-print-directory install DESTDIR=$(stage) PREFIX=/usr/local >$(target)/install.log
	@install -D -t $(stage)/usr/local/libexec/bulkhead-tests tests/demo-show
	@mkdir -p $(stage)/usr/local/share/bulkhead-tests
	@for image in busybox debian; do \
	  directory=$$(tests/images/build-$$image) && \
	  tar -C "$$directory" -cf "$(stage)/usr/local/share/bulkhead-tests/$$image.tar" . || exit 1; \
	done

# For tests only. Cargo puts it in the place of the agent proper, which must have been used by then, and keeps both.
faulty-agent: stage
	cargo build --profile guest --locked -p bulkhead-agent --features fault-injection
	@install -D $(guest)/bulkhead-agent $(artifacts)/bulkhead-agent-faulty

# The same, and the suite, the benchmarks and what they need.
test-stage: tests faulty-agent
	@install -t $(stage)/usr/local/libexec/bulkhead-tests $(binaries)/lab-suite $(binaries)/lab-bench $(binaries)/containerd-suite \
	  $(artifacts)/bulkhead-agent-faulty

demo: stage
	@tests/demo

test: test-stage forky-image
	@tests/run

soak: test-stage forky-image
	@tests/soak

bench: test-stage forky-image
	@tests/bench

lab: test-stage
	@BULKHEAD_ARTIFACTS=$(stage) tests/lab/lab up
	@tests/lab/lab shell

clean:
	cargo clean
