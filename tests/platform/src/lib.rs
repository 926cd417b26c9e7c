//! What the tests' UEFI applications that boot in another's place share: the files of their volume, and the start of what was
//! to boot.
#![cfg_attr(target_os = "uefi", no_std)]

#[cfg(target_os = "uefi")]
extern crate alloc;

#[cfg(target_os = "uefi")]
mod next;
#[cfg(target_os = "uefi")]
pub use next::{files, start_next};
