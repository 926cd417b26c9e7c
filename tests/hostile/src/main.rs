//! Firmware with an implant, for tests: `docs/attacks.md`.
//!
//! Boots in place of Cordon's loader, loads itself once more as a runtime driver, and starts what the disk's `next.efi` is,
//! with the text of `next.txt` as its options. The driver stands before the variable services and does what the guest asks
//! it to through variables of one vendor GUID. Devices go on with what `dma.txt` says, if it is there.
#![cfg_attr(target_os = "uefi", no_std, no_main)]

#[cfg(target_os = "uefi")]
extern crate alloc;

#[cfg(target_os = "uefi")]
mod application;
#[cfg(target_os = "uefi")]
mod dma;
#[cfg(target_os = "uefi")]
mod driver;

/// The application exists for `x86_64-unknown-uefi` alone; here it is a name that says so.
#[cfg(not(target_os = "uefi"))]
fn main() {
    eprintln!("hostile is not a program: build it with --target x86_64-unknown-uefi");
    std::process::exit(1);
}
