//! Why DMA is not known to be blocked.

use core::fmt;

use hv::addr::PhysRange;

use crate::dmar;

/// What a unit lacks, or what tables given for it need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// ECAP.QI: queued invalidation.
    Queue,
    /// CAP.SAGAW: tables of a known depth.
    Levels,
    /// ECAP.IR: interrupt remapping.
    Interrupts,
    /// GCMD.CFI: interrupts of compatibility format beside remapping (QEMU's unit lets them pass and knows no such bit).
    Compatible,
    /// CAP.PLMR: a protected region below 4 GiB.
    LowRegion,
    /// CAP.PHMR: a protected region above 4 GiB.
    HighRegion,
}

/// Why a guest's page table can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadTables {
    /// It is not in VT-d's format.
    Format,
    /// Not every unit walks tables of so many levels.
    Levels(u32),
    /// Not every unit knows pages as large as the one at this address.
    PageSize(u64),
    /// The page at this address leads to memory that is closed.
    Closed(u64),
}

/// Why a unit is not in the state that it should be in. [`Error::code`] outlives a reset: append, never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The DMAR is malformed.
    Dmar(dmar::Error),
    /// There is no unit.
    None,
    /// There are more than [`super::MAX_UNITS`].
    TooMany,
    /// The register window can't be mapped, or covers memory that it must not.
    Base {
        /// Base by the DMAR.
        base: u64,
    },
    /// Nothing answers at the register base.
    Silent {
        /// Base of the window.
        base: u64,
    },
    /// The unit lacks something.
    Lacks {
        /// Base of the unit.
        base: u64,
        /// What.
        need: Need,
    },
    /// A register does not hold what was written.
    Register {
        /// Base of the unit.
        base: u64,
        /// Offset of the register.
        register: u32,
        /// What it should hold.
        wanted: u64,
        /// What it holds.
        found: u64,
    },
    /// The unit did not get there within the time allowed.
    Timeout {
        /// Base of the unit.
        base: u64,
        /// Register waited for; zero: the word of a wait descriptor.
        register: u32,
        /// What was waited for.
        wanted: u64,
    },
    /// The unit refused an invalidation.
    Invalidation {
        /// Base of the unit.
        base: u64,
        /// The fault status register.
        status: u32,
    },
    /// Memory is to be protected already, and is not.
    Uncovered {
        /// Base of the unit.
        base: u64,
        /// The memory.
        range: PhysRange,
    },
    /// A protected region, rounded to what the unit can express, would cover a region that firmware reserved.
    Overlap {
        /// Base of the unit.
        base: u64,
        /// The reserved region.
        range: PhysRange,
    },
    /// Memory of ours can't be read or written.
    Memory {
        /// Where.
        address: u64,
    },
    /// Memory of ours changed under us: a device wrote there.
    Tampered {
        /// Where.
        address: u64,
    },
    /// The number of units is not the one handed over.
    Count {
        /// Units found.
        found: u64,
        /// Units handed over.
        wanted: u64,
    },
    /// The guest's page table can't be used.
    Tables(BadTables),
    /// No CPU accepts an interrupt of this vector.
    Vector {
        /// The vector.
        vector: u8,
    },
}

impl Error {
    /// A number for places that hold no text.
    pub const fn code(&self) -> u8 {
        match self {
            Self::Dmar(_) => 1,
            Self::None => 2,
            Self::TooMany => 3,
            Self::Base { .. } => 4,
            Self::Silent { .. } => 5,
            Self::Lacks { .. } => 6,
            Self::Register { .. } => 7,
            Self::Timeout { .. } => 8,
            Self::Invalidation { .. } => 9,
            Self::Uncovered { .. } => 10,
            Self::Overlap { .. } => 11,
            Self::Memory { .. } => 12,
            Self::Tampered { .. } => 13,
            Self::Count { .. } => 14,
            Self::Tables(_) => 15,
            Self::Vector { .. } => 16,
        }
    }
}

impl From<dmar::Error> for Error {
    fn from(error: dmar::Error) -> Self {
        Self::Dmar(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dmar(error) => error.fmt(f),
            Self::None => f.write_str("no VT-d unit"),
            Self::TooMany => write!(f, "more than {} VT-d units", super::MAX_UNITS),
            Self::Base { base } => write!(f, "VT-d unit {base:#x}: unusable register window"),
            Self::Silent { base } => write!(f, "VT-d unit {base:#x}: no answer"),
            Self::Lacks { base, need } => write!(f, "VT-d unit {base:#x} lacks {need:?}"),
            Self::Register { base, register, wanted, found } => {
                write!(f, "VT-d unit {base:#x}: register {register:#x} is {found:#x}, not {wanted:#x}")
            }
            Self::Timeout { base, register, wanted } => {
                write!(f, "VT-d unit {base:#x}: timeout on register {register:#x}, wanted {wanted:#x}")
            }
            Self::Invalidation { base, status } => {
                write!(f, "VT-d unit {base:#x}: invalidation refused, fault status {status:#x}")
            }
            Self::Uncovered { base, range } => {
                write!(f, "VT-d unit {base:#x}: protected regions do not cover {range}")
            }
            Self::Overlap { base, range } => {
                write!(f, "VT-d unit {base:#x}: protected regions would cover reserved region {range}")
            }
            Self::Memory { address } => write!(f, "DMA area: no access to {address:#x}"),
            Self::Tampered { address } => write!(f, "DMA area: changed near {address:#x}"),
            Self::Count { found, wanted } => write!(f, "{found} VT-d units found, {wanted} handed over"),
            Self::Tables(BadTables::Format) => f.write_str("guest DMA tables are not in VT-d's format"),
            Self::Tables(BadTables::Levels(levels)) => {
                write!(f, "guest DMA tables have {levels} levels, which not every unit walks")
            }
            Self::Tables(BadTables::PageSize(at)) => {
                write!(f, "guest DMA tables: page at {at:#x} is larger than every unit knows")
            }
            Self::Tables(BadTables::Closed(at)) => {
                write!(f, "guest DMA tables: page at {at:#x} leads to memory that is closed")
            }
            Self::Vector { vector } => write!(f, "interrupt vector {vector}, limit 16 to 254"),
        }
    }
}

impl core::error::Error for Error {}
