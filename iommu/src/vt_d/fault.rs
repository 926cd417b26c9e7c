//! The fault records: who tried what, where.
//!
//! Spec: \[VTD\] "Fault Recording Registers", "Fault Reason Encodings".

use crate::fault::{Access, Fault, Reason};

/// Bit of the high quadword: there is a record; cleared by writing one.
pub(super) const RECORDED: u64 = 1 << 63;
/// Bit of the high quadword: the request was a read.
const READ: u64 = 1 << 62;

/// Fault reasons that say what a device may not do; all others below 20h are about tables and descriptors.
mod reason {
    /// The root entry is not present.
    pub const ROOT_ABSENT: u8 = 0x01;
    /// The context entry is not present.
    pub const CONTEXT_ABSENT: u8 = 0x02;
    /// The address is beyond the width of the tables.
    pub const BEYOND: u8 = 0x04;
    /// No right to write.
    pub const WRITE: u8 = 0x05;
    /// No right to read.
    pub const READ: u8 = 0x06;
    /// A translated request, or one for a translation, that the context entry does not allow.
    pub const TRANSLATED: u8 = 0x0d;
    /// The first reason that is about interrupts.
    pub const INTERRUPTS: u8 = 0x20;
    /// Reasons about interrupts that are the device's doing: a request with reserved bits, an index beyond the table, an
    /// entry that is not present, compatibility format, a wrong source.
    pub const OF_DEVICE: [u8; 5] = [0x20, 0x21, 0x22, 0x25, 0x26];
}

/// What a record says. For an interrupt the address is its index.
pub(super) fn decode(segment: u16, [low, high]: [u64; 2]) -> Fault {
    let code = (high >> 32 & 0xff) as u8;
    let source = u32::from(segment) << 16 | (high & 0xffff) as u32;
    if code >= reason::INTERRUPTS {
        let told = if reason::OF_DEVICE.contains(&code) { Reason::Interrupt } else { Reason::Broken(code) };
        return Fault { source, address: low >> 48, access: Access::Write, reason: told };
    }
    let access = if high & READ != 0 { Access::Read } else { Access::Write };
    let told = match code {
        reason::ROOT_ABSENT
        | reason::CONTEXT_ABSENT
        | reason::BEYOND
        | reason::WRITE
        | reason::READ
        | reason::TRANSLATED => Reason::Denied,
        other => Reason::Broken(other),
    };
    Fault { source, address: low & !0xfff, access, reason: told }
}
