# make demo      set everything up and show the main job          make lab      a shell in the lab, with the binaries in PATH
# make test      everything that can be tested quickly            make bench    DESIGN's table, with the peers in the same run
# make soak      what takes longer                                make install  DESTDIR= PREFIX=/usr/local

PREFIX  ?= /usr/local
DESTDIR ?=
SYSCONFDIR ?= /etc

target    := $(or $(CARGO_TARGET_DIR),target)
binaries  := $(target)/x86_64-unknown-linux-gnu/release
guest     := $(target)/x86_64-unknown-linux-gnu/guest
artifacts := $(target)/artifacts
stage     := $(target)/stage

.PHONY: help demo test soak bench lab install build setup kernel binaries faulty-agent guest-image stage test-stage clean
.NOTPARALLEL:

help:
	@sed -n 's/^# //p' Makefile

setup:
	@tests/setup

kernel: setup
	@guest-kernel/build

binaries: setup
	cargo build --release --locked -p bulkhead -p bulkhead-vmm -p bulkhead-rootfs-builder
	cargo build --profile guest --locked -p bulkhead-agent

# For tests only. Before `binaries`, which puts the agent proper in its place; cargo keeps both.
faulty-agent: setup
	cargo build --profile guest --locked -p bulkhead-agent --features fault-injection
	@install -D $(guest)/bulkhead-agent $(artifacts)/bulkhead-agent-faulty

guest-image: binaries
	@mkdir -p $(artifacts)
	$(binaries)/bulkhead-guest-image --agent $(guest)/bulkhead-agent --output $(artifacts)/guest.erofs

build: kernel guest-image

install: build
	install -D -m 755 $(binaries)/bulkhead $(DESTDIR)$(PREFIX)/bin/bulkhead
	install -D -m 755 $(binaries)/bulkhead-vmm $(DESTDIR)$(PREFIX)/libexec/bulkhead/bulkhead-vmm
	install -D -m 644 $(artifacts)/vmlinux $(DESTDIR)$(PREFIX)/share/bulkhead/vmlinux
	install -D -m 644 $(artifacts)/guest.erofs $(DESTDIR)$(PREFIX)/share/bulkhead/guest.erofs
	test -e $(DESTDIR)$(SYSCONFDIR)/bulkhead/config.toml || \
	  install -D -m 644 sandbox/config.toml $(DESTDIR)$(SYSCONFDIR)/bulkhead/config.toml

# What the lab gets: an installation, the suite and its images.
stage: build
	@rm -rf $(stage)
	@$(MAKE) --no-print-directory install DESTDIR=$(stage) PREFIX=/usr/local >$(target)/install.log
	cargo build --release --locked -p bulkhead-tests
	@install -D -t $(stage)/usr/local/libexec/bulkhead-tests $(binaries)/lab-suite $(binaries)/lab-bench tests/demo-show
	@mkdir -p $(stage)/usr/local/share/bulkhead-tests
	@for image in busybox debian; do \
	  directory=$$(tests/images/build-$$image) && \
	  tar -C "$$directory" -cf "$(stage)/usr/local/share/bulkhead-tests/$$image.tar" . || exit 1; \
	done

test-stage: faulty-agent stage
	@install -D -t $(stage)/usr/local/libexec/bulkhead-tests $(artifacts)/bulkhead-agent-faulty

demo: stage
	@tests/demo

test: test-stage
	@tests/run

soak: test-stage
	@tests/soak

bench: stage
	@tests/bench

lab: test-stage
	@BULKHEAD_ARTIFACTS=$(stage) tests/lab/lab up
	@tests/lab/lab shell

clean:
	cargo clean
