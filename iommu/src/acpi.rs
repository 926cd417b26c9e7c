//! Finds one ACPI table and makes a private copy of it. Small enough for the SLB stage.
//!
//! All of it is input from the gap: each byte is read once, lengths are limited, and nothing is believed but
//! what the copy holds. A checksum that holds proves nothing; one that does not is a broken table.
//!
//! Spec: \[ACPI\] "Root System Description Pointer", "System Description Table Header".

use core::fmt;

use hv::io::PhysMem;

use crate::field;

/// Bytes of a table header.
pub const HEADER_SIZE: usize = 36;
/// Longest XSDT or RSDT that is read: some 500 tables.
const ROOT_MAX: u32 = 4096;

/// Why a table was not copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The address holds no memory that may be read.
    Unreadable(u64),
    /// The structure at the address does not begin with its signature.
    Signature(u64),
    /// The bytes of the structure at the address do not add up to zero.
    Checksum(u64),
    /// The structure's length is outside what is accepted.
    Length {
        /// Where the structure is.
        address: u64,
        /// The length it gives.
        length: u32,
        /// The largest length accepted.
        limit: u32,
    },
    /// No table of this signature.
    Missing([u8; 4]),
    /// Two tables of this signature, at these addresses: which one counts is not ours to guess.
    Twice(u64, u64),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unreadable(at) => write!(f, "ACPI: {at:#x} is no readable memory"),
            Self::Signature(at) => write!(f, "ACPI: no valid signature at {at:#x}"),
            Self::Checksum(at) => write!(f, "ACPI: wrong checksum of the structure at {at:#x}"),
            Self::Length { address, length, limit } => {
                write!(f, "ACPI: structure at {address:#x} has length {length}, limit {limit}")
            }
            Self::Missing(signature) => write!(f, "ACPI: no table {}", signature.escape_ascii()),
            Self::Twice(a, b) => write!(f, "ACPI: the same table twice, at {a:#x} and {b:#x}"),
        }
    }
}

impl core::error::Error for Error {}

/// Copies the one table with `signature` into `out` and returns its length; `rsdp` is the root pointer's address.
///
/// # Errors
/// [`Error`]; `out` may then hold part of a table.
pub fn copy_table(mem: &impl PhysMem, rsdp: u64, signature: [u8; 4], out: &mut [u8]) -> Result<usize, Error> {
    let (root, entry_size) = root_table(mem, rsdp)?;
    let at = find(mem, root, entry_size, signature)?;

    let header: [u8; 8] = read(mem, at)?;
    let length = u32::from_le_bytes(field(&header, 4).unwrap_or_default());
    let limit = u32::try_from(out.len()).unwrap_or(u32::MAX);
    let too_long = Error::Length { address: at, length, limit };
    let copy = usize::try_from(length).ok().and_then(|l| out.get_mut(..l)).ok_or(too_long)?;
    if copy.len() < HEADER_SIZE {
        return Err(too_long);
    }
    if !mem.read(at, copy) {
        return Err(Error::Unreadable(at));
    }
    // The header was read a second time: only the copy counts.
    if field(copy, 0) != Some(signature) {
        return Err(Error::Signature(at));
    }
    if field(copy, 4) != Some(length.to_le_bytes()) {
        return Err(too_long);
    }
    if sum(copy) != 0 {
        return Err(Error::Checksum(at));
    }
    Ok(copy.len())
}

/// Address of the XSDT and 8, or of the RSDT and 4.
fn root_table(mem: &impl PhysMem, rsdp: u64) -> Result<(u64, u64), Error> {
    // ACPI 1.0's pointer has 20 bytes; nothing says that 36 are readable before the revision is known.
    let first: [u8; 20] = read(mem, rsdp)?;
    if field(&first, 0) != Some(*b"RSD PTR ") {
        return Err(Error::Signature(rsdp));
    }
    if sum(&first) != 0 {
        return Err(Error::Checksum(rsdp));
    }
    let rsdt = (u64::from(u32::from_le_bytes(field(&first, 16).unwrap_or_default())), 4);
    if field::<1>(&first, 15) < Some([2]) {
        return Ok(rsdt);
    }
    let rest: [u8; 16] = read(mem, rsdp.wrapping_add(20))?;
    if sum(&first).wrapping_add(sum(&rest)) != 0 {
        return Err(Error::Checksum(rsdp));
    }
    match u64::from_le_bytes(field(&rest, 4).unwrap_or_default()) {
        0 => Ok(rsdt),
        xsdt => Ok((xsdt, 8)),
    }
}

/// Address of the only table with `signature` that the root table lists.
fn find(mem: &impl PhysMem, root: u64, entry_size: u64, signature: [u8; 4]) -> Result<u64, Error> {
    let header: [u8; HEADER_SIZE] = read(mem, root)?;
    let wanted = if entry_size == 8 { *b"XSDT" } else { *b"RSDT" };
    if field(&header, 0) != Some(wanted) {
        return Err(Error::Signature(root));
    }
    let length = u32::from_le_bytes(field(&header, 4).unwrap_or_default());
    let body = match u64::from(length).checked_sub(HEADER_SIZE as u64) {
        Some(body) if length <= ROOT_MAX && body.is_multiple_of(entry_size) => body,
        _ => return Err(Error::Length { address: root, length, limit: ROOT_MAX }),
    };
    let mut total = sum(&header);
    let mut found = None;
    let mut offset = 0u64;
    while offset < body {
        let at = root.wrapping_add(HEADER_SIZE as u64).wrapping_add(offset);
        let mut entry = [0u8; 8];
        let used = if entry_size == 8 { &mut entry[..] } else { &mut entry[..4] };
        if !mem.read(at, used) {
            return Err(Error::Unreadable(at));
        }
        total = total.wrapping_add(sum(used));
        let table = u64::from_le_bytes(entry);
        // An entry of zero is a hole that some firmware leaves.
        if table != 0 && read::<4>(mem, table)? == signature {
            if let Some(other) = found {
                return Err(Error::Twice(other, table));
            }
            found = Some(table);
        }
        offset = offset.wrapping_add(entry_size);
    }
    if total != 0 {
        return Err(Error::Checksum(root));
    }
    found.ok_or(Error::Missing(signature))
}

fn read<const N: usize>(mem: &impl PhysMem, at: u64) -> Result<[u8; N], Error> {
    let mut out = [0; N];
    if mem.read(at, &mut out) { Ok(out) } else { Err(Error::Unreadable(at)) }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |total, byte| total.wrapping_add(*byte))
}

#[cfg(test)]
mod tests;
