//! The part of a board's firmware that the emulated board lacks, for tests: OVMF knows QEMU's boards alone.
//!
//! Boots in place of Cordon's loader, does what the disk's `board.bin` says ([`record`]), and starts what the disk's `next.efi` is,
//! with the text of `next.txt` as its options.
#![cfg_attr(target_os = "uefi", no_std, no_main)]

#[cfg(target_os = "uefi")]
mod application;

/// The application exists for `x86_64-unknown-uefi` alone; here it is a name that says so.
#[cfg(not(target_os = "uefi"))]
fn main() {
    eprintln!("platform is not a program: build it with --target x86_64-unknown-uefi");
    std::process::exit(1);
}
