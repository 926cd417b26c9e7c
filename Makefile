# Everything goes through the bench (`tests/`); these are its words. `make help` lists them.
CARGO ?= cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
# The first build shows its progress, later ones have nothing to show.
BENCH = $(CARGO) run $(if $(wildcard $(TARGET_DIR)/debug/bench),--quiet) -p tests --bin bench --

# As typed: make must not look for its own variables in a guest's command or a kernel's command line.
override GUEST_CMD := $(value GUEST_CMD)
override CMDLINE := $(value CMDLINE)
export GUEST_CMD CMDLINE

.PHONY: help setup build measure run bench attacks lint test test-all
help: ## This text
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18
	@sed -n 's/^#@ \?//p' Makefile

setup: ## Install what the bench needs (every other target does it too; silent when nothing is missing)
	@tests/setup.sh

build: setup ## Build the images into build/
	@$(BENCH) build

measure: build ## Print size and SHA-256 of what a launch measures
	@$(BENCH) measure

#@
#@ make run boots Linux under Cordon in an emulated machine and gives its console to this terminal
#@ (Ctrl-a x ends the machine, Ctrl-d in the shell turns it off). Variables:
#@   GUEST_CMD='...'  run this shell script as root in the guest instead, print its output and end with its
#@                    status (make itself turns any status but 0 into 2, and names it; `bench run` does not)
#@   MACHINE=amd|intel  QEMU with SVM and SKINIT, or Bochs with VMX and SENTER (amd); a boot of the latter takes minutes
#@   CPU=arrandale|cannonlake  of MACHINE=intel: VMX as it was in 2010, or SHA instructions and newer VMX, for one CPU (arrandale; bench: both)
#@   NATIVE=1         boot the same machine, kernel, RAM disk and command line without Cordon
#@   MEM=2048  SMP=2  RAM in MiB, CPUs (1 with MACHINE=intel unless SMP says more: each takes the emulator's time from the others)
#@   TPM=tis|crb      TPM interface (tis)
#@   BANKS=sha256     active PCR banks of the TPM, e.g. sha1,sha256,sha384,sha512
#@   FIRMWARE=smm|plain  variables kept in SMM, or in the runtime driver (smm)
#@   KERNEL= INITRD=  other files than Debian's kernel and the bench's RAM disk
#@   CMDLINE=         words to add to the kernel command line
#@   CONFIG=          Cordon's configuration file
#@   RELAUNCH=1       keep memory for policy relaunch
#@   FAULT=           a CPU, TPM or loader that misbehaves at SKINIT: slb-length, slb-unaligned, slb-changed, tpm-error, ticket;
#@                    at SENTER: mle-tables, mle-hole, heap-size, pmr-uncovering, stale-error, dmar-changed, rlp-missing
#@   QEMU_ARGS=       more arguments for QEMU
#@   TIMEOUT=240      seconds until the guest must take commands, and that a command may take (1800 with MACHINE=intel)
#@   LOG=warn|info    report failures only, or also each stage of the boot and its time (warn)
#@   TOOLCHAIN=rustup|debian  where the images' targets come from (rustup if it answers)
#@ Logs of a run stay in build/run-*/: console.log, drtm.log (what the bench did at SKINIT), qemu.log.
run: $(if $(filter 1,$(NATIVE)),setup,build) ## Boot Linux under Cordon; see below
	@$(BENCH) run

bench: build ## Compare the machine with Cordon to the same one without (RUNS=3 boots of each, and make run's variables)
	@$(BENCH) bench
ifneq ($(MACHINE),intel)
	@$(BENCH) dma
	@$(BENCH) calls
	@$(BENCH) rounds
endif

attacks: build ## Run every attack with Cordon and without; ends with `N blocked, N live unprotected`
	@$(BENCH) attacks --all

# Debian's Rust has neither tool, and no `core` for the images' targets that clippy could use.
lint: setup ## Formatting and lints of the host code and of the images
	@$(CARGO) fmt --version >/dev/null 2>&1 && $(CARGO) clippy --version >/dev/null 2>&1 || \
		{ echo "lint: this Rust has no rustfmt or no clippy: nothing checked" >&2; exit 0; }; \
	set -ex; \
	$(CARGO) fmt --all --check; \
	$(CARGO) clippy --quiet --workspace --all-targets -- -D warnings; \
	$(CARGO) clippy --quiet -p tests --test '*' -- -D warnings; \
	if grep -qx rustup build/toolchain; then \
		$(CARGO) clippy --quiet -p mle -p bare --bins --target x86_64-unknown-none -- -D warnings; \
		$(CARGO) clippy --quiet -p loader -p hostile -p platform --target x86_64-unknown-uefi -- -D warnings; \
	fi

test: build lint ## Formatting, lints, host tests, then tests on whole machines
	$(CARGO) test --workspace
	$(CARGO) test -p tests --test builds
	$(CARGO) test -p tests --test vmx
	$(CARGO) test -p tests --test machine -- --test-threads=2
	$(CARGO) test -p tests --test services -- --test-threads=2
	$(CARGO) test -p tests --test senter -- --test-threads=2
	$(CARGO) test -p tests --test devices
	$(CARGO) test -p tests --test intel -- --test-threads=3
	$(BENCH) attacks

test-all: test ## Also boot every combination of firmware, TPM, CPUs and memory
	$(CARGO) test -p tests --test vmx -- --ignored
	$(CARGO) test -p tests --test devices -- --ignored --nocapture
	$(CARGO) test -p tests --test services -- --ignored
	$(CARGO) test -p tests --test senter -- --ignored
	$(CARGO) test -p tests --test intel -- --ignored --test-threads=2
	$(CARGO) test -p tests --test attacks -- --ignored
	$(CARGO) test -p tests --test machine -- --ignored --nocapture
