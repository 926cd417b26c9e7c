//! What the parsers of DMAR and IVRS have in common: how a table is refused.

use core::fmt;

use crate::field;

/// What can be wrong with tables of one kind; it displays as the place.
pub trait Problem: fmt::Display {
    /// The signature of such tables, as text.
    const TABLE: &str;
    /// Not such a table, or its length field is not the number of bytes given.
    const HEADER: Self;
}

/// Why a table is refused: what is wrong, where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed<P> {
    /// Kind of problem.
    pub problem: P,
    /// Byte of the table at which the structure begins.
    pub offset: usize,
    /// The offending value, see the problem's kinds.
    pub value: u64,
    /// What the value may at most be, where that makes sense; zero elsewhere.
    pub limit: u64,
}

impl<P: Problem> Malformed<P> {
    /// Checks the signature, and that the table gives its length as what it is, at least `least` bytes.
    pub(crate) fn check_header(table: &[u8], least: usize) -> Result<(), Self> {
        let length = field(table, 4).map_or(0, u32::from_le_bytes);
        let signed = table.starts_with(P::TABLE.as_bytes());
        if signed && table.len() >= least && usize::try_from(length) == Ok(table.len()) {
            return Ok(());
        }
        let (value, limit) = (u64::from(length), table.len() as u64);
        Err(Self { problem: P::HEADER, offset: 0, value, limit })
    }
}

impl<P: Problem> fmt::Display for Malformed<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { problem, offset, value, limit } = self;
        write!(f, "{}: {problem} at offset {offset}: {value:#x} (limit {limit:#x})", P::TABLE)
    }
}

impl<P: Problem + fmt::Debug> core::error::Error for Malformed<P> {}
