//! Why DMA is not known to be blocked.

use core::fmt;

use super::Root;
use crate::ivrs;

/// Why an IOMMU is not in the state that it should be in. [`Error::code`] outlives a reset: append, never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The IVRS is malformed.
    Ivrs(ivrs::Error),
    /// There is no IOMMU.
    None,
    /// There are more than [`super::MAX_UNITS`].
    TooMany,
    /// The IVRS lists an IOMMU of another PCI segment than 0.
    Segment {
        /// Its device id.
        device: u16,
        /// Its segment.
        segment: u16,
    },
    /// PCI shows an IOMMU that the IVRS hides.
    Unlisted {
        /// Its device id.
        device: u16,
    },
    /// The IVRS lists an IOMMU that PCI does not show.
    Absent {
        /// Its device id.
        device: u16,
    },
    /// A PCI function of IOMMU class has no AMD IOMMU capability.
    NoCapability {
        /// Its device id.
        device: u16,
    },
    /// The IVRS and the PCI capability name different register bases.
    BaseDiffers {
        /// Device id.
        device: u16,
        /// Base by the IVRS.
        table: u64,
        /// Base by the capability.
        capability: u64,
    },
    /// The register window is not aligned, can't be mapped, or covers memory that it must not.
    Base {
        /// Device id.
        device: u16,
        /// Base by the IVRS.
        base: u64,
    },
    /// Nothing answers at the register base.
    Silent {
        /// Device id.
        device: u16,
        /// Base of the window.
        base: u64,
    },
    /// A PCI function decodes the address at which nothing may answer.
    Claimed {
        /// Device id.
        device: u16,
        /// Offset of the base address register.
        register: u8,
    },
    /// A register does not hold what was written.
    Register {
        /// Device id of the IOMMU.
        device: u16,
        /// Offset of the register.
        register: u32,
        /// What it should hold.
        wanted: u64,
        /// What it holds.
        found: u64,
    },
    /// The IOMMU did not get there within the time allowed.
    Timeout {
        /// Device id of the IOMMU.
        device: u16,
        /// Register waited for; zero: the completion store.
        register: u32,
        /// What was waited for.
        wanted: u64,
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
    /// The number of IOMMUs is not the one handed over.
    Count {
        /// IOMMUs found.
        found: u64,
        /// IOMMUs handed over.
        wanted: u64,
    },
    /// The guest's page table can't be used.
    Root {
        /// The table.
        root: Root,
        /// Levels that all IOMMUs can walk.
        levels: u8,
    },
}

impl Error {
    /// A number for places that hold no text.
    pub const fn code(&self) -> u8 {
        match self {
            Self::Ivrs(_) => 1,
            Self::None => 2,
            Self::TooMany => 3,
            Self::Segment { .. } => 4,
            Self::Unlisted { .. } => 5,
            Self::Absent { .. } => 6,
            Self::NoCapability { .. } => 7,
            Self::BaseDiffers { .. } => 8,
            Self::Base { .. } => 9,
            Self::Silent { .. } => 10,
            Self::Claimed { .. } => 11,
            Self::Register { .. } => 12,
            Self::Timeout { .. } => 13,
            Self::Memory { .. } => 14,
            Self::Tampered { .. } => 15,
            Self::Count { .. } => 16,
            Self::Root { .. } => 17,
        }
    }
}

impl From<ivrs::Error> for Error {
    fn from(error: ivrs::Error) -> Self {
        Self::Ivrs(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = |device: &u16| Id(*device);
        match self {
            Self::Ivrs(error) => error.fmt(f),
            Self::None => f.write_str("no IOMMU"),
            Self::TooMany => write!(f, "more than {} IOMMUs", super::MAX_UNITS),
            Self::Segment { device, segment } => {
                write!(f, "IOMMU {} is on PCI segment {segment}, limit 0", id(device))
            }
            Self::Unlisted { device } => write!(f, "IVRS does not list IOMMU {}", id(device)),
            Self::Absent { device } => write!(f, "IVRS lists IOMMU {}, which PCI lacks", id(device)),
            Self::NoCapability { device } => write!(f, "IOMMU {} has no capability block", id(device)),
            Self::BaseDiffers { device, table, capability } => {
                write!(f, "IOMMU {}: base {table:#x} by IVRS, {capability:#x} by PCI", id(device))
            }
            Self::Base { device, base } => {
                write!(f, "IOMMU {}: unusable register base {base:#x}", id(device))
            }
            Self::Silent { device, base } => write!(f, "IOMMU {}: no answer at {base:#x}", id(device)),
            Self::Claimed { device, register } => {
                write!(f, "PCI function {}: register {register:#x} decodes reserved addresses", id(device))
            }
            Self::Register { device, register, wanted, found } => {
                write!(f, "IOMMU {}: register {register:#x} is {found:#x}, not {wanted:#x}", id(device))
            }
            Self::Timeout { device, register, wanted } => {
                write!(f, "IOMMU {}: timeout on register {register:#x}, wanted {wanted:#x}", id(device))
            }
            Self::Memory { address } => write!(f, "DMA area: no access to {address:#x}"),
            Self::Tampered { address } => write!(f, "DMA area: changed near {address:#x}"),
            Self::Count { found, wanted } => write!(f, "{found} IOMMUs found, {wanted} handed over"),
            Self::Root { root, levels } => {
                write!(f, "guest DMA table {:#x}: {} levels, limit {levels}", root.table, root.levels)
            }
        }
    }
}

impl core::error::Error for Error {}

/// A device id, as people write it.
struct Id(u16);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.0 >> 8, self.0 >> 3 & 0x1f, self.0 & 7)
    }
}
