//! What the tests' UEFI applications that boot in another's place share: the files of their volume, and the start of what was
//! to boot; and the format of `board.bin`, which the bench writes.
#![cfg_attr(target_os = "uefi", no_std)]

#[cfg(target_os = "uefi")]
extern crate alloc;

#[cfg(target_os = "uefi")]
mod next;
#[cfg(target_os = "uefi")]
pub use next::{files, start_next};

/// `board.bin` is a list of records: kind and length of the data as 32-bit words, a 64-bit address, the data, all little endian.
pub mod record {
    /// Bytes before a record's data.
    pub const HEADER: usize = 16;
    /// An ACPI table to install. No address.
    pub const ACPI: u32 = 1;
    /// Memory from the address on, with length and EFI memory type as 64-bit words, belongs to no operating system.
    pub const TAKE: u32 = 2;
    /// Data for the address, written byte by byte.
    pub const WRITE: u32 = 3;
    /// A 64-bit word for the register whose number the address is, on every CPU.
    pub const MSR: u32 = 4;
    /// A 64-bit address to which base and length of what is started are written, as 64-bit words. No data.
    pub const ANNOUNCE: u32 = 5;
}
