//! The DMAR table: which VT-d units there are, which devices they serve, and which memory firmware wants mapped.
//!
//! [`Dmar::new`] walks the whole table once and refuses what does not fit together; afterwards reading it can't fail.
//! VT-d units do not show in PCI configuration space, so a unit that the table hides stays hidden: the table to
//! give is the copy that SINIT checked, where there is one (`docs/trust.md`).
//!
//! Spec: \[VTD\] "DMA Remapping Reporting Structure"; checked against Linux 6.12 `include/acpi/actbl1.h`.

use core::fmt;

use hv::addr::PhysRange;
use hv::io::PortIo;

use crate::field;
use crate::malformed::{self, Malformed};
use crate::pci::Function;
use crate::reserved::Reserved;

/// Bytes before the first structure: ACPI header, width, flags, reserved.
const HEADER_SIZE: usize = 48;
/// Largest width of physical addresses.
const WIDTH_MAX: u8 = 52;
const PAGE: u64 = hv::addr::PAGE_SIZE;

bitflags::bitflags! {
    /// What firmware says of the platform.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Flags: u8 {
        /// INTR_REMAP: interrupts can be remapped.
        const INTERRUPT_REMAPPING = 1;
        /// X2APIC_OPT_OUT: firmware asks not to use x2APIC mode.
        const X2APIC_OPT_OUT = 2;
        /// DMA_CTRL_PLATFORM_OPT_IN: firmware says that it blocked DMA until the hand-over.
        const DMA_OPT_IN = 4;
    }
}

/// What is wrong with a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Not a DMAR, or its length field is not the number of bytes given.
    Header,
    /// The width of physical addresses, in bits.
    Width,
    /// A structure or device scope is shorter than its kind needs, or longer than what is left; the value is its length,
    /// the limit what is left.
    Length,
    /// A unit's register base is zero, not page aligned, or beyond the address width; the value is the base.
    Base,
    /// Two units with one register base; the value is the base.
    Duplicate,
    /// A second unit that claims the rest of its segment; the value is the segment.
    IncludeAll,
    /// A reserved region that is not whole pages, empty, or beyond the address width; the value is its start.
    Memory,
    /// A device or function number in a path that does not exist; the value holds them as a device id.
    Path,
}

impl malformed::Problem for Problem {
    const TABLE: &str = "DMAR";
    const HEADER: Self = Self::Header;
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header: signature or length",
            Self::Width => "host address width",
            Self::Length => "length of structure or scope",
            Self::Base => "register base",
            Self::Duplicate => "second unit with register base",
            Self::IncludeAll => "second unit for all of segment",
            Self::Memory => "reserved memory region",
            Self::Path => "device in path",
        })
    }
}

/// Why a table is refused.
pub type Error = Malformed<Problem>;

/// A checked DMAR.
#[derive(Clone, Copy, Debug)]
pub struct Dmar<'a>(&'a [u8]);

impl<'a> Dmar<'a> {
    /// Checks a private copy of the table.
    ///
    /// # Errors
    /// [`Error`]: the first problem found.
    pub fn new(table: &'a [u8]) -> Result<Self, Error> {
        Error::check_header(table, HEADER_SIZE)?;
        let dmar = Self(table);
        if dmar.width() > WIDTH_MAX || dmar.width() < 32 {
            let (value, limit) = (u64::from(dmar.width()), u64::from(WIDTH_MAX));
            return Err(Error { problem: Problem::Width, offset: 0, value, limit });
        }
        let mut offset = HEADER_SIZE;
        while offset < table.len() {
            let structure = Structure::at(table, offset)?;
            structure.check_scopes()?;
            if let Some(unit) = structure.unit() {
                dmar.check_unit(&unit)?;
            }
            if let Some(region) = structure.region() {
                dmar.check_region(&region)?;
            }
            offset = offset.saturating_add(structure.bytes.len());
        }
        Ok(dmar)
    }

    fn check_unit(&self, unit: &Unit<'a>) -> Result<(), Error> {
        let error = |problem, value| Err(Error { problem, offset: unit.structure.offset, value, limit: 0 });
        let base = unit.base();
        if base == 0 || !base.is_multiple_of(PAGE) || base > self.last_address() {
            return error(Problem::Base, base);
        }
        let mut earlier = self.units().take_while(|other| other.structure.offset < unit.structure.offset);
        if earlier.clone().any(|other| other.base() == base) {
            return error(Problem::Duplicate, base);
        }
        let same = |other: Unit<'_>| other.includes_all() && other.segment() == unit.segment();
        if unit.includes_all() && earlier.any(same) {
            return error(Problem::IncludeAll, u64::from(unit.segment()));
        }
        Ok(())
    }

    fn check_region(&self, region: &Region<'a>) -> Result<(), Error> {
        let structure = region.structure;
        let (start, last) = (structure.u64(8), structure.u64(16));
        let whole = start.is_multiple_of(PAGE) && last.wrapping_add(1).is_multiple_of(PAGE);
        if whole && start < last && last <= self.last_address() {
            return Ok(());
        }
        let (offset, limit) = (structure.offset, self.last_address());
        Err(Error { problem: Problem::Memory, offset, value: start, limit })
    }

    /// Bits of a physical address.
    pub fn width(&self) -> u8 {
        self.0.get(36).copied().unwrap_or_default().saturating_add(1)
    }

    fn last_address(&self) -> u64 {
        1u64.wrapping_shl(self.width().into()).wrapping_sub(1)
    }

    /// What firmware says of the platform; bits without a name are dropped.
    pub fn flags(&self) -> Flags {
        Flags::from_bits_truncate(self.0.get(37).copied().unwrap_or_default())
    }

    /// Writes the table of a machine that has one unit, with its registers at `base`, and remaps interrupts with it alone: the
    /// same I/O APICs and timer blocks, and all PCI devices. Gives the bytes used; `None` when `out` is too short, or when
    /// there is another segment than the first, which one unit cannot serve.
    pub fn write_single(&self, base: u64, out: &mut [u8]) -> Option<usize> {
        const INCLUDES_ALL: u8 = 1;
        const UNIT_SIZE: usize = 16;
        if self.units().any(|unit| unit.segment() != 0) {
            return None;
        }
        let scopes = self
            .units()
            .flat_map(|unit| unit.scopes())
            .filter(|scope| matches!(scope.kind(), ScopeKind::IoApic | ScopeKind::Hpet));
        let first = HEADER_SIZE.saturating_add(UNIT_SIZE);
        let used = scopes.clone().fold(first, |sum, scope| sum.saturating_add(scope.bytes.len()));
        let out = out.get_mut(..used)?;
        let flags = Flags::INTERRUPT_REMAPPING | Flags::X2APIC_OPT_OUT;
        let (length, unit_length) =
            (u32::try_from(used).ok()?, u16::try_from(used.saturating_sub(HEADER_SIZE)).ok()?);
        let parts: [&[u8]; 11] = [
            self.0.get(..4)?,
            &length.to_le_bytes(),
            // Revision, a checksum to come, and who made the table.
            self.0.get(8..9)?,
            &[0],
            self.0.get(10..37)?,
            &[flags.bits()],
            &[0; 10],
            &kind::DRHD.to_le_bytes(),
            &unit_length.to_le_bytes(),
            &[INCLUDES_ALL, 0, 0, 0],
            &base.to_le_bytes(),
        ];
        let bytes = parts.into_iter().chain(scopes.map(|scope| scope.bytes)).flatten();
        out.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        let sum = out.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        *out.get_mut(9)? = sum.wrapping_neg();
        Some(used)
    }

    fn structures(&self) -> impl Iterator<Item = Structure<'a>> + Clone + use<'a> {
        Structures { table: self.0, offset: HEADER_SIZE }
    }

    /// The remapping units (DRHD).
    pub fn units(&self) -> impl Iterator<Item = Unit<'a>> + Clone + use<'a> {
        self.structures().filter_map(|structure| structure.unit())
    }

    /// Memory that devices use on firmware's behalf (RMRR).
    pub fn regions(&self) -> impl Iterator<Item = Region<'a>> + Clone + use<'a> {
        self.structures().filter_map(|structure| structure.region())
    }

    /// What [`Self::regions`] says, once for each device that it lists, by the bus numbers that bridges have now; once
    /// for a region that lists none.
    pub fn reserved<'p, P: PortIo>(&self, ports: &'p P) -> impl Iterator<Item = Reserved> + use<'a, 'p, P> {
        self.regions().filter_map(|region| Some((region.range()?, region))).flat_map(
            move |(range, region)| {
                let segment = region.segment();
                let empty = region.scopes().next().is_none().then_some(None);
                let devices = region.scopes().map(move |scope| {
                    // Ports reach segment 0 only.
                    let device = if segment == 0 { scope.resolve(ports).ok() } else { None };
                    device.map(|id| u32::from(segment) << 16 | u32::from(id))
                });
                empty.into_iter().chain(devices).map(move |device| Reserved {
                    range,
                    first: device,
                    last: device,
                    untranslated: false,
                })
            },
        )
    }

    /// Root ports whose devices may have translation caches of their own (ATSR).
    pub fn ats_ports(&self) -> impl Iterator<Item = AtsPorts<'a>> + use<'a> {
        self.structures().filter(|s| s.kind() == kind::ATSR).map(|structure| AtsPorts { structure })
    }

    /// Integrated devices with translation caches of their own (SATC).
    pub fn ats_devices(&self) -> impl Iterator<Item = AtsDevices<'a>> + use<'a> {
        self.structures().filter(|s| s.kind() == kind::SATC).map(|structure| AtsDevices { structure })
    }

    /// Which memory is near which unit (RHSA).
    pub fn affinities(&self) -> impl Iterator<Item = Affinity> + use<'a> {
        self.structures()
            .filter(|s| s.kind() == kind::RHSA)
            .map(|s| Affinity { base: s.u64(8), domain: s.u32(16) })
    }

    /// Devices that ACPI names and that do DMA (ANDD).
    pub fn acpi_devices(&self) -> impl Iterator<Item = AcpiDevice<'a>> + use<'a> {
        self.structures().filter(|s| s.kind() == kind::ANDD).map(|structure| AcpiDevice { structure })
    }
}

/// Types of structures.
mod kind {
    pub const DRHD: u16 = 0;
    pub const RMRR: u16 = 1;
    pub const ATSR: u16 = 2;
    pub const RHSA: u16 = 3;
    pub const ANDD: u16 = 4;
    pub const SATC: u16 = 5;
}

#[derive(Clone)]
struct Structures<'a> {
    table: &'a [u8],
    offset: usize,
}

impl<'a> Iterator for Structures<'a> {
    type Item = Structure<'a>;

    fn next(&mut self) -> Option<Structure<'a>> {
        let structure = Structure::at(self.table, self.offset).ok()?;
        self.offset = self.offset.checked_add(structure.bytes.len())?;
        Some(structure)
    }
}

/// A structure of any type: at least what its type needs, and all inside the table.
#[derive(Clone, Copy, Debug)]
struct Structure<'a> {
    offset: usize,
    bytes: &'a [u8],
}

impl<'a> Structure<'a> {
    fn at(table: &'a [u8], offset: usize) -> Result<Self, Error> {
        let rest = table.get(offset..).unwrap_or_default();
        let length = usize::from(field(rest, 2).map_or(0, u16::from_le_bytes));
        let minimum = match field(rest, 0).map(u16::from_le_bytes) {
            Some(kind::DRHD) => 16,
            Some(kind::RMRR) => 24,
            Some(kind::RHSA) => 20,
            // The name has at least its end.
            Some(kind::ANDD) => 9,
            Some(kind::ATSR | kind::SATC) => 8,
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

    fn kind(&self) -> u16 {
        self.u16(0)
    }

    fn u8(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or_default()
    }

    fn u16(&self, at: usize) -> u16 {
        field(self.bytes, at).map_or(0, u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> u32 {
        field(self.bytes, at).map_or(0, u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        field(self.bytes, at).map_or(0, u64::from_le_bytes)
    }

    fn unit(self) -> Option<Unit<'a>> {
        (self.kind() == kind::DRHD).then_some(Unit { structure: self })
    }

    fn region(self) -> Option<Region<'a>> {
        (self.kind() == kind::RMRR).then_some(Region { structure: self })
    }

    /// Where the device scopes begin; `None` for structures that have none.
    fn scopes_at(&self) -> Option<usize> {
        match self.kind() {
            kind::DRHD => Some(16),
            kind::RMRR => Some(24),
            kind::ATSR | kind::SATC => Some(8),
            _ => None,
        }
    }

    fn scopes(&self) -> impl Iterator<Item = Scope<'a>> + Clone + use<'a> {
        let structure = *self;
        let mut at = self.scopes_at().unwrap_or(usize::MAX);
        core::iter::from_fn(move || {
            let scope = Scope::at(&structure, at).ok()?;
            at = at.checked_add(scope.bytes.len())?;
            Some(scope)
        })
    }

    fn check_scopes(&self) -> Result<(), Error> {
        let Some(mut at) = self.scopes_at() else { return Ok(()) };
        while at < self.bytes.len() {
            let scope = Scope::at(self, at)?;
            for (device, function) in scope.path() {
                if device > 31 || function > 7 {
                    return Err(Error {
                        problem: Problem::Path,
                        offset: self.offset.saturating_add(at),
                        value: u64::from(device) << 8 | u64::from(function),
                        limit: 31 << 8 | 7,
                    });
                }
            }
            at = at.saturating_add(scope.bytes.len());
        }
        Ok(())
    }
}

/// A DRHD structure: one remapping unit.
#[derive(Clone, Copy, Debug)]
pub struct Unit<'a> {
    structure: Structure<'a>,
}

impl<'a> Unit<'a> {
    /// Physical address of its registers: not zero, page aligned.
    pub fn base(&self) -> u64 {
        self.structure.u64(8)
    }

    /// Bytes of its registers, by the table: one page unless a later version of the table says more.
    pub fn size(&self) -> u64 {
        PAGE.wrapping_shl(u32::from(self.structure.u8(5) & 0xf))
    }

    /// PCI segment that it serves.
    pub fn segment(&self) -> u16 {
        self.structure.u16(6)
    }

    /// Whether it serves every device of its segment that no other unit lists.
    pub fn includes_all(&self) -> bool {
        self.structure.u8(4) & 1 != 0
    }

    /// Devices listed for it.
    pub fn scopes(&self) -> impl Iterator<Item = Scope<'a>> + Clone + use<'a> {
        self.structure.scopes()
    }
}

/// An RMRR structure: memory that the listed devices use for firmware, and go on using.
#[derive(Clone, Copy, Debug)]
pub struct Region<'a> {
    structure: Structure<'a>,
}

impl<'a> Region<'a> {
    /// The memory: whole pages.
    pub fn range(&self) -> Option<PhysRange> {
        PhysRange::from_last(self.structure.u64(8), self.structure.u64(16))
    }

    /// PCI segment of the devices.
    pub fn segment(&self) -> u16 {
        self.structure.u16(6)
    }

    /// The devices.
    pub fn scopes(&self) -> impl Iterator<Item = Scope<'a>> + use<'a> {
        self.structure.scopes()
    }
}

/// An ATSR structure.
#[derive(Clone, Copy, Debug)]
pub struct AtsPorts<'a> {
    structure: Structure<'a>,
}

impl<'a> AtsPorts<'a> {
    /// Whether all root ports of the segment are meant.
    pub fn all(&self) -> bool {
        self.structure.u8(4) & 1 != 0
    }

    /// PCI segment.
    pub fn segment(&self) -> u16 {
        self.structure.u16(6)
    }

    /// The root ports.
    pub fn scopes(&self) -> impl Iterator<Item = Scope<'a>> + use<'a> {
        self.structure.scopes()
    }
}

/// A SATC structure.
#[derive(Clone, Copy, Debug)]
pub struct AtsDevices<'a> {
    structure: Structure<'a>,
}

impl<'a> AtsDevices<'a> {
    /// Whether the devices only work with their cache in use.
    pub fn required(&self) -> bool {
        self.structure.u8(4) & 1 != 0
    }

    /// PCI segment.
    pub fn segment(&self) -> u16 {
        self.structure.u16(6)
    }

    /// The devices.
    pub fn scopes(&self) -> impl Iterator<Item = Scope<'a>> + use<'a> {
        self.structure.scopes()
    }
}

/// A RHSA structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affinity {
    /// Register base of the unit.
    pub base: u64,
    /// Proximity domain.
    pub domain: u32,
}

/// An ANDD structure.
#[derive(Clone, Copy, Debug)]
pub struct AcpiDevice<'a> {
    structure: Structure<'a>,
}

impl<'a> AcpiDevice<'a> {
    /// Number by which scopes mean it.
    pub fn number(&self) -> u8 {
        self.structure.u8(7)
    }

    /// Its name in ACPI's namespace: up to the first zero, or all bytes when there is none.
    pub fn name(&self) -> &'a [u8] {
        let name = self.structure.bytes.get(8..).unwrap_or_default();
        name.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

/// What a device scope means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScopeKind {
    /// A PCI device.
    Endpoint,
    /// A PCI bridge and all behind it.
    Bridge,
    /// An I/O APIC; the enumeration id is its APIC id.
    IoApic,
    /// A timer block that sends MSIs; the enumeration id is its number.
    Hpet,
    /// A device that ACPI names; the enumeration id is that of its ANDD structure.
    Acpi,
    /// A kind not known here.
    Other(u8),
}

/// A device scope: from a bus through bridges to a device.
#[derive(Clone, Copy, Debug)]
pub struct Scope<'a> {
    bytes: &'a [u8],
}

impl<'a> Scope<'a> {
    /// Bytes before the path.
    const HEADER_SIZE: usize = 6;

    fn at(structure: &Structure<'a>, at: usize) -> Result<Self, Error> {
        let rest = structure.bytes.get(at..).unwrap_or_default();
        let length = usize::from(rest.get(1).copied().unwrap_or_default());
        match rest.get(..length) {
            // A path has at least one step, and whole ones.
            Some(bytes) if length >= Self::HEADER_SIZE.saturating_add(2) && length.is_multiple_of(2) => {
                Ok(Self { bytes })
            }
            _ => Err(Error {
                problem: Problem::Length,
                offset: structure.offset.saturating_add(at),
                value: length as u64,
                limit: rest.len() as u64,
            }),
        }
    }

    fn u8(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or_default()
    }

    /// What it means.
    pub fn kind(&self) -> ScopeKind {
        match self.u8(0) {
            1 => ScopeKind::Endpoint,
            2 => ScopeKind::Bridge,
            3 => ScopeKind::IoApic,
            4 => ScopeKind::Hpet,
            5 => ScopeKind::Acpi,
            other => ScopeKind::Other(other),
        }
    }

    /// Number of the I/O APIC, timer block or ACPI device.
    pub fn enumeration(&self) -> u8 {
        self.u8(4)
    }

    /// Bus on which the path starts.
    pub fn bus(&self) -> u8 {
        self.u8(5)
    }

    /// The path: device and function of each bridge, and of the device at its end.
    pub fn path(&self) -> impl Iterator<Item = (u8, u8)> + use<'a> {
        let steps = self.bytes.get(Self::HEADER_SIZE..).unwrap_or_default();
        steps.as_chunks().0.iter().map(|[device, function]| (*device, *function))
    }

    /// The device id at the end of the path, in segment 0, by the bus numbers that the bridges on the way have now.
    /// `Err` is the id of the function on the way that is absent or no bridge.
    ///
    /// Spec: \[PCI\] "Type 01h Configuration Space Header", Secondary Bus Number.
    pub fn resolve(&self, ports: &impl PortIo) -> Result<u16, u16> {
        const BUSES: u8 = 0x18;
        let mut id = 0;
        let mut bus = self.bus();
        for (step, (device, function)) in self.path().enumerate() {
            if step > 0 {
                let bridge = Function::new(ports, id);
                if !bridge.exists() || !bridge.is_bridge() {
                    return Err(id);
                }
                bus = (bridge.read(BUSES) >> 8) as u8;
            }
            id = u16::from(bus) << 8 | u16::from(device & 0x1f) << 3 | u16::from(function & 7);
        }
        Ok(id)
    }
}

#[cfg(test)]
mod tests;
