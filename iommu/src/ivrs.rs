//! The IVRS table: which AMD IOMMUs there are, which devices they serve, and which memory firmware wants mapped.
//!
//! [`Ivrs::new`] walks the whole table once and refuses what does not fit together; afterwards reading it can't fail.
//! The table comes from the gap: it says what to look for, not what is true (see [`crate::amd_vi`] for the checks
//! against the hardware).
//!
//! Spec: \[IOMMU\] "I/O Virtualization ACPI Table"; checked against Linux 6.12 `drivers/iommu/amd/init.c`.

use core::fmt;

use hv::addr::PhysRange;

use crate::field;
use crate::malformed::{self, Malformed};
use crate::reserved::Reserved;

/// Bytes before the first block: ACPI header, IVinfo, reserved.
const HEADER_SIZE: usize = 48;

/// What is wrong with a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Not an IVRS, or its length field is not the number of bytes given.
    Header,
    /// A block or device entry does not fit what is left of its parent; the value is its length, the limit what is left.
    Length,
    /// A device entry of unknown length; the value is its type.
    EntryType,
    /// A range of device ids that was not closed, not opened, or runs backwards; the value is a device id.
    Range,
    /// Two blocks of one type for one IOMMU; the value is its device id.
    Duplicate,
    /// Two blocks of different types for one IOMMU that name different register addresses; the value is its device id.
    Contradiction,
    /// A memory block whose range is empty or wraps; the value is its start.
    Memory,
}

impl malformed::Problem for Problem {
    const TABLE: &str = "IVRS";
    const HEADER: Self = Self::Header;
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header: signature or length",
            Self::Length => "length of block or entry",
            Self::EntryType => "type of device entry",
            Self::Range => "range of device ids",
            Self::Duplicate => "second block for IOMMU",
            Self::Contradiction => "register base differs between blocks for IOMMU",
            Self::Memory => "memory block",
        })
    }
}

/// Why a table is refused.
pub type Error = Malformed<Problem>;

/// A checked IVRS.
#[derive(Clone, Copy, Debug)]
pub struct Ivrs<'a>(&'a [u8]);

impl<'a> Ivrs<'a> {
    /// Checks a private copy of the table.
    ///
    /// # Errors
    /// [`Error`]: the first problem found.
    pub fn new(table: &'a [u8]) -> Result<Self, Error> {
        Error::check_header(table, HEADER_SIZE)?;
        let mut offset = HEADER_SIZE;
        while offset < table.len() {
            let block = Block::at(table, offset)?;
            if let Some(unit) = block.unit() {
                unit.check()?;
                Self(table).check_pairs(&unit)?;
            }
            if let Some(memory) = block.memory() {
                let empty = memory.length == 0;
                if empty || memory.start.checked_add(memory.length.wrapping_sub(1)).is_none() {
                    let value = memory.start;
                    return Err(Error { problem: Problem::Memory, offset, value, limit: 0 });
                }
            }
            offset = offset.saturating_add(block.bytes.len());
        }
        Ok(Self(table))
    }

    /// Compares `unit` with the blocks before it that mean the same IOMMU.
    fn check_pairs(&self, unit: &Unit<'_>) -> Result<(), Error> {
        let earlier = self.all_units().take_while(|other| other.block.offset < unit.block.offset);
        for other in earlier.filter(|other| other.is_same(unit)) {
            let problem = if other.kind() == unit.kind() {
                Problem::Duplicate
            } else if other.base() != unit.base() {
                Problem::Contradiction
            } else {
                continue;
            };
            let value = u64::from(unit.device());
            return Err(Error { problem, offset: unit.block.offset, value, limit: 0 });
        }
        Ok(())
    }

    fn blocks(&self) -> impl Iterator<Item = Block<'a>> + use<'a> {
        let table = self.0;
        let mut offset = HEADER_SIZE;
        core::iter::from_fn(move || {
            let block = Block::at(table, offset).ok()?;
            offset = offset.checked_add(block.bytes.len())?;
            Some(block)
        })
    }

    fn all_units(&self) -> impl Iterator<Item = Unit<'a>> + use<'a> {
        self.blocks().filter_map(|block| block.unit())
    }

    /// The IOMMUs, each once: by the block of the highest type that describes it.
    pub fn units(&self) -> impl Iterator<Item = Unit<'a>> + use<'a> {
        let table = *self;
        self.all_units().filter(move |unit| {
            !table.all_units().any(|other| other.is_same(unit) && other.kind() > unit.kind())
        })
    }

    /// Memory that firmware wants devices to reach, or to be kept from.
    pub fn memory(&self) -> impl Iterator<Item = Memory> + use<'a> {
        self.blocks().filter_map(|block| block.memory())
    }

    /// What [`Self::memory`] says, in the words of both vendors.
    pub fn reserved(&self) -> impl Iterator<Item = Reserved> + use<'a> {
        self.memory().filter_map(|memory| {
            let device = |id: u16| Some(u32::from(memory.segment) << 16 | u32::from(id));
            Some(Reserved {
                range: PhysRange::new(memory.start, memory.length)?,
                first: device(memory.first),
                last: device(memory.last),
                untranslated: memory.is_exclusion(),
            })
        })
    }

    /// Whether an I/O APIC is listed: that firmware expects interrupts to be remapped.
    pub fn lists_io_apic(&self) -> bool {
        const IO_APIC: u8 = 1;
        let special = |entry| matches!(entry, DeviceEntry::Special { variety: IO_APIC, .. });
        self.units().any(|unit| unit.entries().any(special))
    }
}

/// A block of any type: at least its four bytes of header, and all inside the table.
#[derive(Clone, Copy, Debug)]
struct Block<'a> {
    offset: usize,
    bytes: &'a [u8],
}

impl<'a> Block<'a> {
    fn at(table: &'a [u8], offset: usize) -> Result<Self, Error> {
        let rest = table.get(offset..).unwrap_or_default();
        let length = usize::from(field(rest, 2).map_or(0, u16::from_le_bytes));
        let minimum = match rest.first() {
            Some(0x10) => 24,
            Some(0x11 | 0x40) => 40,
            Some(0x20..=0x22) => 32,
            _ => 4,
        };
        match rest.get(..length) {
            Some(bytes) if length >= minimum => Ok(Self { offset, bytes }),
            _ => {
                let (value, limit) = (length as u64, rest.len() as u64);
                Err(Error { problem: Problem::Length, offset, value, limit })
            }
        }
    }

    fn u8(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or_default()
    }

    fn u16(&self, at: usize) -> u16 {
        field(self.bytes, at).map_or(0, u16::from_le_bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        field(self.bytes, at).map_or(0, u64::from_le_bytes)
    }

    fn unit(self) -> Option<Unit<'a>> {
        matches!(self.u8(0), 0x10 | 0x11 | 0x40).then_some(Unit { block: self })
    }

    fn memory(&self) -> Option<Memory> {
        let (first, last) = match self.u8(0) {
            0x20 => (0, u16::MAX),
            0x21 => (self.u16(4), self.u16(4)),
            0x22 => (self.u16(4), self.u16(6)),
            _ => return None,
        };
        let flags = self.u8(1);
        let (segment, start, length) = (self.u16(8), self.u64(16), self.u64(24));
        Some(Memory { segment, first, last, flags, start, length })
    }
}

/// An IVHD block: one IOMMU.
#[derive(Clone, Copy, Debug)]
pub struct Unit<'a> {
    block: Block<'a>,
}

impl<'a> Unit<'a> {
    /// Type of the block: 10h, 11h or 40h.
    pub fn kind(&self) -> u8 {
        self.block.u8(0)
    }

    /// Device id of the IOMMU itself.
    pub fn device(&self) -> u16 {
        self.block.u16(4)
    }

    /// Offset of its capability in its configuration space.
    pub fn capability(&self) -> u16 {
        self.block.u16(6)
    }

    /// Physical address of its registers.
    pub fn base(&self) -> u64 {
        self.block.u64(8)
    }

    /// PCI segment that it serves.
    pub fn segment(&self) -> u16 {
        self.block.u16(16)
    }

    /// The devices that it serves.
    pub fn entries(&self) -> impl Iterator<Item = DeviceEntry> + use<'a> {
        let block = self.block;
        let mut at = self.header_size();
        core::iter::from_fn(move || {
            let (entry, length) = DeviceEntry::at(&block, at).ok()?;
            at = at.checked_add(length)?;
            Some(entry)
        })
    }

    fn header_size(&self) -> usize {
        if self.kind() == 0x10 { 24 } else { 40 }
    }

    fn is_same(&self, other: &Unit<'_>) -> bool {
        (self.segment(), self.device()) == (other.segment(), other.device())
    }

    fn check(&self) -> Result<(), Error> {
        let mut at = self.header_size();
        let mut open = None;
        while at < self.block.bytes.len() {
            let (entry, length) = DeviceEntry::at(&self.block, at)?;
            let range = |device: u16| Error {
                problem: Problem::Range,
                offset: self.block.offset.saturating_add(at),
                value: u64::from(device),
                limit: 0,
            };
            match entry {
                DeviceEntry::Padding => {}
                DeviceEntry::RangeEnd { device } => match open.take() {
                    Some(first) if first <= device => {}
                    _ => return Err(range(device)),
                },
                _ => {
                    if let Some(device) = open {
                        return Err(range(device));
                    }
                    open = entry.opens();
                }
            }
            at = at.saturating_add(length);
        }
        match open {
            None => Ok(()),
            Some(device) => {
                let (offset, value) = (self.block.offset, u64::from(device));
                Err(Error { problem: Problem::Range, offset, value, limit: 0 })
            }
        }
    }
}

/// A device entry. `flags` are the interrupt and management rights that firmware wants for the device: bit 0 INIT,
/// 1 ExtINT, 2 NMI, 5:4 system management, 6 LINT0, 7 LINT1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEntry {
    /// Nothing.
    Padding,
    /// All devices that this IOMMU may serve.
    All {
        /// Rights.
        flags: u8,
    },
    /// One device.
    Select {
        /// Device id.
        device: u16,
        /// Rights.
        flags: u8,
        /// The id under which its requests arrive, when that is another.
        alias: Option<u16>,
    },
    /// First device of a range.
    RangeStart {
        /// Device id.
        device: u16,
        /// Rights.
        flags: u8,
        /// The id under which the requests of all of them arrive, when that is another.
        alias: Option<u16>,
    },
    /// Last device of the range.
    RangeEnd {
        /// Device id.
        device: u16,
    },
    /// An I/O APIC (variety 1) or HPET (variety 2).
    Special {
        /// The id under which its interrupts arrive.
        device: u16,
        /// I/O APIC id, or HPET number.
        handle: u8,
        /// What it is.
        variety: u8,
        /// Rights.
        flags: u8,
    },
    /// A device that ACPI names.
    Acpi {
        /// Device id.
        device: u16,
        /// Rights.
        flags: u8,
    },
    /// An entry of a type not known here, which has a known length.
    Unknown {
        /// Its type.
        kind: u8,
    },
}

impl DeviceEntry {
    fn at(block: &Block<'_>, at: usize) -> Result<(Self, usize), Error> {
        let kind = block.u8(at);
        let left = block.bytes.len().saturating_sub(at);
        let error = |problem, value: usize| Error {
            problem,
            offset: block.offset.saturating_add(at),
            value: value as u64,
            limit: left as u64,
        };
        let length = match kind {
            0x00..=0x3f => 4,
            0x40..=0x7f => 8,
            // 22 bytes, the last of them the length of the name behind.
            0xf0 => usize::from(block.u8(at.saturating_add(21))).saturating_add(22),
            _ => return Err(error(Problem::EntryType, usize::from(kind))),
        };
        if length > left {
            return Err(error(Problem::Length, length));
        }
        let byte = |n: usize| block.u8(at.saturating_add(n));
        let device = block.u16(at.saturating_add(1));
        let flags = byte(3);
        let other = block.u16(at.saturating_add(5));
        let entry = match kind {
            0x00 | 0x40 => Self::Padding,
            0x01 => Self::All { flags },
            0x02 | 0x46 => Self::Select { device, flags, alias: None },
            0x03 | 0x47 => Self::RangeStart { device, flags, alias: None },
            0x04 => Self::RangeEnd { device },
            0x42 => Self::Select { device, flags, alias: Some(other) },
            0x43 => Self::RangeStart { device, flags, alias: Some(other) },
            0x48 => Self::Special { device: other, handle: byte(4), variety: byte(7), flags },
            0xf0 => Self::Acpi { device, flags },
            _ => Self::Unknown { kind },
        };
        Ok((entry, length))
    }

    fn opens(&self) -> Option<u16> {
        if let Self::RangeStart { device, .. } = *self { Some(device) } else { None }
    }
}

/// An IVMD block: `length` bytes from `start` that devices `first..=last` are to reach by their own addresses
/// ([`Memory::is_unity`]) or without translation ([`Memory::is_exclusion`]). What becomes of it is policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// PCI segment of the devices.
    pub segment: u16,
    /// First device id.
    pub first: u16,
    /// Last device id.
    pub last: u16,
    /// Bit 0 unity map, 1 read, 2 write, 3 exclusion range.
    pub flags: u8,
    /// Physical address.
    pub start: u64,
    /// Bytes; not zero, and the range does not wrap.
    pub length: u64,
}

impl Memory {
    /// Whether firmware wants an identity map.
    pub const fn is_unity(&self) -> bool {
        self.flags & 1 != 0
    }

    /// Whether firmware wants the range out of translation.
    pub const fn is_exclusion(&self) -> bool {
        self.flags & 8 != 0
    }
}

#[cfg(test)]
mod tests;
