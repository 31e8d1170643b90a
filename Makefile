# layerfs: build, try, test, measure, install. `make help` lists the targets.
# There is no `clean`: RocksDB compiles for minutes. Remove the target folder yourself if you mean it.

export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)
# Where cargo builds; an absolute path, because the scripts change folders.
export CARGO_TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
MANDIR ?= $(PREFIX)/share/man
UNITDIR ?= $(PREFIX)/lib/systemd/system
# mount(8) looks for its helpers in /sbin only.
HELPERDIR ?= /sbin
COMPLETIONS ?= $(PREFIX)/share
# LXC looks for templates there only.
LXCTEMPLATES ?= /usr/share/lxc/templates
HOOKS ?= $(PREFIX)/share/layerfs/hooks

LAYERCTL := $(CARGO_TARGET_DIR)/release/layerctl
CARGO_FLAGS := --release --locked

.PHONY: help build demo test faults migrations suites torture bench paper lint fuzz install uninstall setup

help:
	@echo 'make build      build layerctl (installs the packages it needs, on Debian and Ubuntu)'
	@echo 'make demo       two hosts, three layers, a push: the whole story in a few minutes'
	@echo 'make test       every test; those that cannot run here say why'
	@echo 'make faults     1,000 transfers over links on which everything goes wrong, 200 between daemons that are killed'
	@echo 'make migrations 50 moves of a guest to and fro, some by runc, LXC and QEMU, and a guest that rewrites 330 MB: what is left, how long each stood still, and how well that was foretold (MOVES="process memory" for some)'
	@echo 'make suites     pjdfstest, fsx, fsstress, unionmount and LTP on a mount, beside the same on the host (SUITES="pjd fsx" for some)'
	@echo 'make torture    databases, git, packages and a build on a mount whose daemon is killed every few seconds (TORTURE="sqlite git" for some)'
	@echo 'make bench      measure against restic, borg, casync, tar and rsync; writes bench.json'
	@echo 'make paper      the paper'"'"'s experiment, by its method and by ours: hours in all, CELL=lxc/ram/found for some; it goes on where it was'
	@echo 'make fuzz       look for inputs that break a decoder, SECONDS_EACH=60 for each target (TARGETS="message import" for some)'
	@echo 'make lint       formatting and clippy'
	@echo 'make install    layerctl, mount.layerfs, man pages, completions, systemd unit, LXC template (PREFIX=$(PREFIX))'

setup:
	@scripts/setup build || true

build: setup
	cargo build $(CARGO_FLAGS) -p tools

demo: build
	@scripts/setup demo || true
	@LAYERCTL=$(LAYERCTL) scripts/demo

# The binary first: the integration tests run it. Documentation examples are not compiled: each would link RocksDB.
test: build
	@scripts/setup test || true
	cargo test $(CARGO_FLAGS) --workspace --lib --bins --tests

faults: build
	LAYERFS_FAULT_RUNS=1000 cargo test $(CARGO_FLAGS) -p migrator --lib -- --nocapture whatever_happens_to_the_link
	LAYERFS_FAULT_PUSHES=200 cargo test $(CARGO_FLAGS) -p layerfs-tests --test integration -- --nocapture faults::

suites: build
	LAYERCTL=$(LAYERCTL) scripts/suites $(SUITES)

torture: build
	LAYERCTL=$(LAYERCTL) scripts/torture $(TORTURE)

migrations: build
	@scripts/setup test || true
	scripts/migrations $(MOVES)

bench: build
	@scripts/setup bench || true
	cargo run $(CARGO_FLAGS) -p layerfs-tests --bin layerfs-bench -- $(BENCH_FLAGS)

paper: build
	@scripts/setup test || true
	cargo run $(CARGO_FLAGS) -p layerfs-tests --bin layerfs-paper -- $(CELL) $(PAPER_FLAGS)

fuzz:
	@scripts/fuzz $(or $(SECONDS_EACH),60) $(TARGETS)

lint:
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings

install:
	@test -x $(LAYERCTL) || { echo 'run `make build` first'; exit 1; }
	install -D -m 755 $(LAYERCTL) $(DESTDIR)$(BINDIR)/layerctl
	install -d $(DESTDIR)$(HELPERDIR)
	ln -sf $(BINDIR)/layerctl $(DESTDIR)$(HELPERDIR)/mount.layerfs
	ln -sf $(BINDIR)/layerctl $(DESTDIR)$(HELPERDIR)/mount.fuse.layerfs
	install -d $(DESTDIR)$(MANDIR)/man1 $(DESTDIR)$(MANDIR)/man8
	$(LAYERCTL) generate man $(DESTDIR)$(MANDIR)/man1
	mv $(DESTDIR)$(MANDIR)/man1/mount.layerfs.8 $(DESTDIR)$(MANDIR)/man8/
	install -d $(DESTDIR)$(COMPLETIONS)/bash-completion/completions $(DESTDIR)$(COMPLETIONS)/zsh/site-functions $(DESTDIR)$(COMPLETIONS)/fish/vendor_completions.d
	$(LAYERCTL) generate completions bash > $(DESTDIR)$(COMPLETIONS)/bash-completion/completions/layerctl
	$(LAYERCTL) generate completions zsh > $(DESTDIR)$(COMPLETIONS)/zsh/site-functions/_layerctl
	$(LAYERCTL) generate completions fish > $(DESTDIR)$(COMPLETIONS)/fish/vendor_completions.d/layerctl.fish
	install -D -m 755 scripts/lxc-layerfs $(DESTDIR)$(LXCTEMPLATES)/lxc-layerfs
	install -D -m 755 scripts/hooks/follow $(DESTDIR)$(HOOKS)/follow
	install -d $(DESTDIR)$(UNITDIR)
	sed 's|@BINDIR@|$(BINDIR)|' scripts/layerfs.service > $(DESTDIR)$(UNITDIR)/layerfs.service

uninstall:
	rm -f $(DESTDIR)$(BINDIR)/layerctl $(DESTDIR)$(HELPERDIR)/mount.layerfs $(DESTDIR)$(HELPERDIR)/mount.fuse.layerfs $(DESTDIR)$(MANDIR)/man1/layerctl*.1 $(DESTDIR)$(MANDIR)/man8/mount.layerfs.8
	rm -f $(DESTDIR)$(COMPLETIONS)/bash-completion/completions/layerctl $(DESTDIR)$(COMPLETIONS)/zsh/site-functions/_layerctl $(DESTDIR)$(COMPLETIONS)/fish/vendor_completions.d/layerctl.fish
	rm -f $(DESTDIR)$(UNITDIR)/layerfs.service $(DESTDIR)$(LXCTEMPLATES)/lxc-layerfs $(DESTDIR)$(HOOKS)/follow
