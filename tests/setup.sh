#!/bin/sh
# Installs what the bench needs and nothing else. Safe to repeat: each step looks first, and a run
# with nothing to do is silent and takes a fraction of a second.
#
#   tests/setup.sh            everything that most targets need
#   tests/setup.sh module     besides, the module for the guest's kernel in tests/guest/firmware-calls
#   tests/setup.sh fwupd      besides, fwupd for the guest
#   TOOLCHAIN=rustup|debian   where `core` for the images' targets comes from (default: rustup if it answers)
set -eu
cd "$(dirname "$0")/.."
mkdir -p build

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "FAILED: $*"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "'$*' needs root: run 'make setup' as root, or install sudo"
    fi
}

# Runs a slow command with its output in a log; prints a dot every few seconds and the log's end on failure.
quietly() {
    log=$1
    shift
    "$@" >"$log" 2>&1 &
    job=$!
    waited=0
    while kill -0 "$job" 2>/dev/null; do
        sleep 1
        waited=$((waited + 1))
        [ $((waited % 5)) -ne 0 ] || printf '.' >&2
    done
    [ "$waited" -lt 5 ] || echo >&2
    if ! wait "$job"; then
        tail -n 15 "$log" >&2
        return 1
    fi
}

installed() { dpkg-query -W -f '${Status}\n' "$@" 2>/dev/null | grep -c '^install ok installed$'; }

# install_packages WHY SECONDS PACKAGE...
install_packages() {
    why=$1 about=$2
    shift 2
    [ "$(installed "$@")" != "$#" ] || return 0
    command -v apt-get >/dev/null || die "$why: no apt-get here; install by hand: $*"
    say "installing $why (about $about): $*"
    quietly build/apt.log as_root apt-get -q update || say "apt-get update failed; trying with the lists that are there"
    quietly build/apt.log as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -q install --yes --no-install-recommends "$@" || die "$why: apt-get install failed, see build/apt.log"
}

packages() {
    install_packages "the emulators and disk tools" "1 minute" \
        qemu-system-x86 bochs bochsbios bochs-sdl vgabios ovmf swtpm swtpm-tools mtools busybox-static efibootmgr efivar tpm2-tools util-linux
}

# fetch FOLDER PACKAGE...: downloads packages, and does not install them.
fetch() {
    into=$1
    shift
    download() { (cd "$into" && apt-get -q -o APT::Sandbox::User=root download "$@"); }
    if ! quietly build/apt.log download "$@"; then
        # A package list older than the archive names versions that are gone.
        quietly build/apt.log as_root apt-get -q update || die "apt-get update failed, see build/apt.log"
        quietly build/apt.log download "$@" || die "download of $* failed, see build/apt.log"
    fi
}

# Of a kernel's package, as patterns of tar's: the kernel, modules of all machines and of those with more devices.
modules() { printf ' ./lib/modules/*/kernel/%s' "$@"; }
PARTS=./boot/vmlinuz-*$(modules arch/x86/kernel block crypto drivers/ata drivers/firmware drivers/scsi fs/efivarfs fs/fat fs/nls lib)
DEVICES=$(modules drivers/block drivers/net/ethernet/intel/e1000e drivers/net/net_failover.ko drivers/net/virtio_net.ko drivers/nvme/host \
    drivers/usb/common drivers/usb/core drivers/usb/host drivers/usb/storage drivers/virtio net/core)

# The distribution's own kernel, unpacked and not installed: the machine's boot files stay as they are.
# kernel META FOLDER SIZE PARTS
kernel() {
    meta=$1 folder=build/$2 size=$3 parts=$4
    # What is unpacked; an earlier bench may have taken less.
    [ ! -e "$folder/vmlinuz" ] || [ "$(cat "$folder/parts" 2>/dev/null)" != "$parts" ] || return 0
    newest() { apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p'; }
    package=$(newest)
    if [ -z "$package" ]; then
        quietly build/apt.log as_root apt-get -q update || die "guest kernel: apt-get update failed, see build/apt.log"
        package=$(newest)
        [ -n "$package" ] || die "guest kernel: the package lists know no $meta"
    fi
    say "fetching the guest kernel $package ($size, about 1 minute)"
    rm -rf "$folder.new"
    mkdir -p "$folder.new/deb" "$folder.new/modules"
    fetch "$folder.new/deb" "$package"
    archive=$(echo "$folder.new"/deb/*.deb)
    set -f
    # shellcheck disable=SC2086
    dpkg-deb --fsys-tarfile "$archive" | tar -x -C "$folder.new/deb" --wildcards $parts ||
        die "guest kernel: $package could not be unpacked"
    set +f
    printf '%s\n' "$parts" >"$folder.new/parts"
    mv "$folder.new"/deb/boot/vmlinuz-* "$folder.new/vmlinuz"
    find "$folder.new/deb/lib" -name '*.ko' -exec mv {} "$folder.new/modules/" \;
    rm -rf "$folder.new/deb" "$folder"
    mv "$folder.new" "$folder"
}

# Builds tests/guest/firmware-calls for the guest's kernel, and puts it to that kernel's modules.
module() {
    built=build/kernel/modules/firmware_calls.ko source=tests/guest/firmware-calls
    [ ! -e "$built" ] || [ "$source/firmware_calls.c" -nt "$built" ] || return 0
    version=$(grep -aom1 'vermagic=[^ ]*' build/kernel/modules/efivarfs.ko | cut -d= -f2)
    install_packages "what builds modules for the guest's kernel" "1 minute" make "linux-headers-$version"
    rm -rf build/firmware-calls
    cp -r "$source" build/firmware-calls
    quietly build/module.log make -C "/usr/src/linux-headers-$version" M="$PWD/build/firmware-calls" modules ||
        die "the guest's module was not built, see build/module.log"
    mv build/firmware-calls/firmware_calls.ko "$built"
    rm -r build/firmware-calls
}

# fwupd with the libraries that this machine lacks, unpacked and not installed: installed it is a service.
fwupd() {
    folder=build/fwupd
    [ ! -e "$folder" ] || return 0
    lacking=$(apt-get install --simulate --no-install-recommends fwupd | sed -n 's/^Inst \([^ ]*\).*/\1/p')
    say "fetching fwupd (6 MB)"
    rm -rf "$folder.new"
    mkdir -p "$folder.new"
    # shellcheck disable=SC2046,SC2086
    fetch "$folder.new" $(printf '%s\n' fwupd $lacking | sort -u)
    for archive in "$folder.new"/*.deb; do
        dpkg-deb --extract "$archive" "$folder.new" || die "fwupd: $archive could not be unpacked"
        rm "$archive"
    done
    mv "$folder.new" "$folder"
}

has_targets() {
    have=$(rustup target list --installed 2>/dev/null) || return 1
    for target in x86_64-unknown-none x86_64-unknown-uefi; do
        echo "$have" | grep -qx "$target" || return 1
    done
}

with_rustup() {
    command -v rustup >/dev/null || return 1
    has_targets && return 0
    say "adding the Rust targets of the images with rustup (about 20 seconds; gives up after 3 minutes)"
    quietly build/rustup.log timeout 180 rustup target add x86_64-unknown-none x86_64-unknown-uefi
}

with_debian() {
    install_packages "Debian's Rust with the source of core" "2 minutes" rustc-web cargo-web rust-web-src lld-19
}

# Leaves the way taken in build/toolchain; the bench reads it there.
rust() {
    before=$(cat build/toolchain 2>/dev/null || true)
    case "${TOOLCHAIN:-}" in
    rustup) with_rustup || die "TOOLCHAIN=rustup: rustup is missing or could not add the targets, see build/rustup.log" && way=rustup ;;
    debian) with_debian && way=debian ;;
    '')
        if has_targets; then
            way=rustup
        elif [ "$before" = debian ] && [ "$(installed rustc-web cargo-web rust-web-src lld-19)" = 4 ]; then
            # rustup was tried before and took its three minutes to fail.
            way=debian
        elif with_rustup; then
            way=rustup
        else
            say "rustup can't give the targets: taking Debian's Rust instead"
            with_debian && way=debian
        fi
        ;;
    *) die "TOOLCHAIN=$TOOLCHAIN: must be rustup or debian" ;;
    esac
    if [ "$before" != "$way" ]; then
        say "Rust for the images: $way"
        echo "$way" >build/toolchain
    fi
    command -v cargo >/dev/null || die "no cargo in PATH: install Rust 1.95 or later with rustup, or run with TOOLCHAIN=debian"
    # Rust links host programs with it, and does not bring it.
    command -v cc >/dev/null || install_packages "what links host programs" "20 seconds" gcc libc6-dev
}

packages
kernel linux-image-amd64 kernel "70 MB" "$PARTS$DEVICES"
kernel linux-image-cloud-amd64 kernel-cloud "27 MB" "$PARTS"
case "${1:-}" in
module) module ;;
fwupd) fwupd ;;
esac
rust
