//! What Cordon reads of the platform firmware and what it shows of it to the guest: the measured
//! configuration, the EFI memory map, the Linux boot protocol, the guest's EFI tables, runtime-service
//! calls as data, the sandbox's state machine, and the list of what is measured.
//!
//! Nothing here touches hardware and nothing allocates. Every byte comes from the loader, the firmware
//! or the guest: it is copied, checked, and only the copy is used.
#![cfg_attr(not(test), no_std)]
// Tests may overflow: that is how they fail.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]
#![forbid(unsafe_code)]

pub mod acpi;
pub mod call;
pub mod capsule;
pub mod config;
pub mod deferred;
pub mod esrt;
pub mod exposure;
pub mod linux;
pub mod measure;
pub mod memmap;
pub mod policy;
pub mod prm;
pub mod sandbox;
pub mod service;
pub mod smm;
pub mod tables;
#[cfg(test)]
mod testmem;
