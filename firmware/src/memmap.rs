//! The firmware's EFI memory map, read as hostile input, and the two maps the guest gets from it.
//!
//! Spec: \[UEFI\] "EFI_BOOT_SERVICES.GetMemoryMap()"; \[LINUX-BOOT\] "e820_table" in the zero page.

use core::fmt;

use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange, sort_by_range};
pub use uefi_raw::table::boot::{MemoryAttribute, MemoryType};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most descriptors read from the firmware.
pub const MAX_DESCRIPTORS: usize = 384;
/// Most descriptors of the guest's map.
pub const MAX_GUEST_DESCRIPTORS: usize = 512;
/// Most carve-outs.
pub const MAX_CARVE_OUTS: usize = 32;
/// Most e820 entries: the zero page has room for no more.
pub const MAX_E820: usize = 128;
/// Largest descriptor accepted, in bytes: firmware pads the 40 bytes to 48; more is not seen.
pub const MAX_DESCRIPTOR_SIZE: usize = 256;
/// Version of the descriptors read and written.
pub const DESCRIPTOR_VERSION: u32 = 1;
/// First address that no x86 CPU has.
pub const PHYS_LIMIT: u64 = 1 << 52;

/// A memory descriptor as it lies in memory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Descriptor {
    /// Memory type.
    pub ty: U32,
    /// Zero.
    pub padding: U32,
    /// First address.
    pub phys_start: U64,
    /// Virtual address, for SetVirtualAddressMap.
    pub virt_start: U64,
    /// Pages of 4 KiB.
    pub pages: U64,
    /// Attribute bits.
    pub attributes: U64,
}

/// A range of physical memory of one type. Its ends are page boundaries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Memory type.
    pub ty: MemoryType,
    /// Where.
    pub range: PhysRange,
    /// Attribute bits.
    pub attributes: MemoryAttribute,
}

impl Region {
    /// Whether this is firmware's at runtime, by type or by attribute: it goes into the sandbox and
    /// the guest does not see it.
    pub fn is_runtime(&self) -> bool {
        self.attributes.contains(MemoryAttribute::RUNTIME)
            || matches!(self.ty, MemoryType::RUNTIME_SERVICES_CODE | MemoryType::RUNTIME_SERVICES_DATA)
    }

    /// Whether this is RAM that is nobody's once boot services have ended.
    pub fn is_reusable(&self) -> bool {
        !self.is_runtime()
            && matches!(
                self.ty,
                MemoryType::LOADER_CODE
                    | MemoryType::LOADER_DATA
                    | MemoryType::BOOT_SERVICES_CODE
                    | MemoryType::BOOT_SERVICES_DATA
                    | MemoryType::CONVENTIONAL
            )
    }

    /// What the guest is told of it when no carve-out covers it.
    fn for_guest(&self) -> (MemoryType, MemoryAttribute) {
        let ty = if self.is_runtime() {
            MemoryType::RESERVED
        } else if self.is_reusable() {
            MemoryType::CONVENTIONAL
        } else {
            self.ty
        };
        (ty, self.attributes.difference(MemoryAttribute::RUNTIME))
    }
}

/// What a carve-out is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// The MLE's, or kept as it is for the guest to look at: never RAM. MLE region, SLB, launch page,
    /// event log.
    Reserved,
    /// What the guest starts with and knows of by other means, so that it is RAM in e820 but not free
    /// in the EFI map: kernel, initrd, command line, zero page, the guest's EFI memory map.
    Loaded,
    /// Our thunk page: runtime services code.
    Thunks,
    /// Our EFI tables and what they point to: runtime services data.
    Tables,
}

impl Use {
    fn for_guest(self) -> (MemoryType, MemoryAttribute) {
        let wb = MemoryAttribute::WRITE_BACK;
        match self {
            Self::Reserved => (MemoryType::RESERVED, wb),
            Self::Loaded => (MemoryType::LOADER_DATA, wb),
            Self::Thunks => (MemoryType::RUNTIME_SERVICES_CODE, wb | MemoryAttribute::RUNTIME),
            Self::Tables => (MemoryType::RUNTIME_SERVICES_DATA, wb | MemoryAttribute::RUNTIME),
        }
    }

    fn may_lie_in(self, region: &Region) -> bool {
        // The MLE region is EFI reserved memory: the loader asked for it so.
        region.is_reusable()
            || (self == Self::Reserved && region.ty == MemoryType::RESERVED && !region.is_runtime())
    }
}

/// A range taken out of the guest's free memory; widened to whole pages when the maps are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CarveOut {
    /// Where.
    pub range: PhysRange,
    /// What for.
    pub usage: Use,
}

/// Why a map was refused. Index: which descriptor, from 0, in the order of the firmware's map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// Descriptor version other than [`DESCRIPTOR_VERSION`].
    Version(u32),
    /// Descriptor size below 40 or above [`MAX_DESCRIPTOR_SIZE`].
    DescriptorSize(u32),
    /// The map is empty or no multiple of the descriptor size.
    Size {
        /// Bytes of the map.
        size: usize,
        /// Bytes of a descriptor.
        descriptor: u32,
    },
    /// More descriptors than the limit.
    TooMany {
        /// What is too many.
        what: &'static str,
        /// How many fit.
        limit: usize,
    },
    /// The start is not on a page boundary.
    Unaligned {
        /// Which descriptor.
        index: usize,
        /// Its start.
        start: u64,
    },
    /// The end is past [`PHYS_LIMIT`].
    PastEnd {
        /// Which descriptor.
        index: usize,
        /// Its start.
        start: u64,
        /// Its pages.
        pages: u64,
    },
    /// Two descriptors share memory.
    Overlap(PhysRange, PhysRange),
    /// A carve-out lies in memory that cannot be given to it.
    CarveOutPlace {
        /// The carve-out.
        carve_out: PhysRange,
        /// First address that is not fit for it.
        at: u64,
    },
    /// Two carve-outs with different uses share a page.
    CarveOutOverlap(PhysRange, PhysRange),
    /// The firmware claims for its runtime what no firmware may have.
    RuntimeForbidden {
        /// The runtime region.
        region: PhysRange,
        /// What it overlaps.
        forbidden: PhysRange,
    },
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EFI memory map: ")?;
        match *self {
            Self::Version(v) => write!(f, "descriptor version {v}, must be {DESCRIPTOR_VERSION}"),
            Self::DescriptorSize(s) => {
                write!(f, "descriptor size {s}, must be 40 to {MAX_DESCRIPTOR_SIZE}")
            }
            Self::Size { size, descriptor } => {
                write!(f, "{size} bytes are not one or more descriptors of {descriptor}")
            }
            Self::TooMany { what, limit } => write!(f, "too many {what}, limit {limit}"),
            Self::Unaligned { index, start } => {
                write!(f, "descriptor {index} starts at {start:#x}, inside a page")
            }
            Self::PastEnd { index, start, pages } => {
                write!(f, "descriptor {index}: {pages:#x} pages from {start:#x} end past {PHYS_LIMIT:#x}")
            }
            Self::Overlap(a, b) => write!(f, "{a} and {b} overlap"),
            Self::CarveOutPlace { carve_out, at } => {
                write!(f, "{carve_out} is wanted, but {at:#x} is not free memory")
            }
            Self::CarveOutOverlap(a, b) => write!(f, "{a} and {b} are wanted for different uses"),
            Self::RuntimeForbidden { region, forbidden } => {
                write!(f, "firmware's runtime region {region} overlaps {forbidden}")
            }
        }
    }
}

/// The firmware's map: sorted by address, no two regions overlap.
#[derive(Clone, Debug)]
pub struct MemoryMap {
    regions: Vec<Region, MAX_DESCRIPTORS>,
}

impl MemoryMap {
    /// Reads `bytes`, the caller's private copy of the map. Descriptors of no pages, which some
    /// firmware has, are skipped.
    pub fn parse(bytes: &[u8], descriptor_size: u32, version: u32) -> Result<Self, MapError> {
        if version != DESCRIPTOR_VERSION {
            return Err(MapError::Version(version));
        }
        let stride = usize::try_from(descriptor_size)
            .ok()
            .filter(|s| (size_of::<Descriptor>()..=MAX_DESCRIPTOR_SIZE).contains(s))
            .ok_or(MapError::DescriptorSize(descriptor_size))?;
        let chunks = bytes.chunks_exact(stride);
        if bytes.is_empty() || !chunks.remainder().is_empty() {
            return Err(MapError::Size { size: bytes.len(), descriptor: descriptor_size });
        }
        let mut regions = Vec::<Region, MAX_DESCRIPTORS>::new();
        for (index, chunk) in chunks.enumerate() {
            let Ok((descriptor, _)) = Descriptor::ref_from_prefix(chunk) else { continue };
            let (start, pages) = (descriptor.phys_start.get(), descriptor.pages.get());
            if pages == 0 {
                continue;
            }
            if !start.is_multiple_of(PAGE_SIZE) {
                return Err(MapError::Unaligned { index, start });
            }
            let range = pages
                .checked_mul(PAGE_SIZE)
                .and_then(|len| PhysRange::new(start, len))
                .filter(|r| r.last() < PHYS_LIMIT)
                .ok_or(MapError::PastEnd { index, start, pages })?;
            let region = Region {
                ty: MemoryType(descriptor.ty.get()),
                range,
                attributes: MemoryAttribute::from_bits_retain(descriptor.attributes.get()),
            };
            let full = MapError::TooMany { what: "descriptors", limit: MAX_DESCRIPTORS };
            regions.push(region).map_err(|_| full)?;
        }
        sort_by_range(&mut regions, |r| r.range);
        for (a, b) in regions.iter().zip(regions.iter().skip(1)) {
            if a.range.overlaps(&b.range) {
                return Err(MapError::Overlap(a.range, b.range));
            }
        }
        Ok(Self { regions })
    }

    /// All regions, by address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// What is the firmware's at runtime and goes into the sandbox: code, data, and memory-mapped
    /// devices that carry the runtime attribute.
    pub fn runtime(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter().filter(|r| r.is_runtime())
    }

    /// The runtime region that holds `addr`.
    pub fn runtime_at(&self, addr: u64) -> Option<&Region> {
        self.runtime().find(|r| r.range.contains_addr(addr))
    }

    /// Fails when the firmware claims one of `forbidden` for its runtime: the MLE's memory, the IOMMU's,
    /// APICs' or TPM's registers, PCI configuration space, which the sandbox would then be given.
    pub fn check_runtime(&self, forbidden: &[PhysRange]) -> Result<(), MapError> {
        for region in self.runtime() {
            if let Some(f) = forbidden.iter().find(|f| f.overlaps(&region.range)) {
                return Err(MapError::RuntimeForbidden { region: region.range, forbidden: *f });
            }
        }
        Ok(())
    }

    /// Whether all of `range` is in the map as something other than device registers.
    pub fn is_memory(&self, range: &PhysRange) -> bool {
        let device = |ty| matches!(ty, MemoryType::MMIO | MemoryType::MMIO_PORT_SPACE);
        self.first_unfit(range, |region| !device(region.ty)).is_none()
    }

    /// First address in `range` that is not in a region that `fit` accepts.
    fn first_unfit(&self, range: &PhysRange, fit: impl Fn(&Region) -> bool) -> Option<u64> {
        let mut at = range.start();
        for region in self.regions.iter().filter(|r| fit(r)) {
            if region.range.contains_addr(at) {
                if region.range.last() >= range.last() {
                    return None;
                }
                at = region.range.last().saturating_add(1);
            }
        }
        Some(at)
    }

    /// The guest's map: runtime regions become reserved memory, what boot services and the loader held
    /// becomes free, and `carve_outs` get the types of their uses. Everything wanted for a carve-out
    /// must be free memory (or EFI reserved, for [`Use::Reserved`]), so none overlaps a runtime region.
    pub fn guest(&self, carve_outs: &[CarveOut]) -> Result<GuestMap, MapError> {
        let carve_outs = normal(carve_outs)?;
        for c in &carve_outs {
            if let Some(at) = self.first_unfit(&c.range, |region| c.usage.may_lie_in(region)) {
                return Err(MapError::CarveOutPlace { carve_out: c.range, at });
            }
        }
        let mut map = GuestMap { regions: Vec::new() };
        for region in &self.regions {
            let (ty, attributes) = region.for_guest();
            let mut rest = Some(region.range);
            for c in &carve_outs {
                let Some(left) = rest.filter(|left| left.overlaps(&c.range)) else { continue };
                if let Some(before) = c.range.start().checked_sub(1)
                    && let Some(range) = PhysRange::from_last(left.start(), before)
                {
                    map.push(Region { ty, range, attributes })?;
                }
                let (start, last) = (left.start().max(c.range.start()), left.last().min(c.range.last()));
                if let Some(range) = PhysRange::from_last(start, last) {
                    let (ty, attributes) = c.usage.for_guest();
                    map.push(Region { ty, range, attributes })?;
                }
                rest = c.range.end().and_then(|end| PhysRange::from_last(end, left.last()));
            }
            if let Some(range) = rest {
                map.push(Region { ty, range, attributes })?;
            }
        }
        Ok(map)
    }
}

/// Carve-outs as whole pages, sorted, those of one use that touch made one.
fn normal(carve_outs: &[CarveOut]) -> Result<Vec<CarveOut, MAX_CARVE_OUTS>, MapError> {
    let full = MapError::TooMany { what: "carve-outs", limit: MAX_CARVE_OUTS };
    let mut sorted = Vec::<CarveOut, MAX_CARVE_OUTS>::from_slice(carve_outs).map_err(|_| full)?;
    for c in &mut sorted {
        c.range = c.range.page_outward();
    }
    sort_by_range(&mut sorted, |c| c.range);
    let mut out = Vec::<CarveOut, MAX_CARVE_OUTS>::new();
    for c in sorted {
        match out.last_mut() {
            Some(last) if last.range.overlaps(&c.range) => {
                if last.usage != c.usage {
                    return Err(MapError::CarveOutOverlap(last.range, c.range));
                }
                last.range = hull(&last.range, &c.range);
            }
            _ => out.push(c).map_err(|_| full)?,
        }
    }
    Ok(out)
}

/// The smallest range that holds both.
fn hull(a: &PhysRange, b: &PhysRange) -> PhysRange {
    PhysRange::from_last(a.start().min(b.start()), a.last().max(b.last())).unwrap_or(*a)
}

/// Type of an e820 entry.
///
/// Spec: \[ACPI\] "Address Range Types".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Type {
    /// Free RAM.
    Ram = 1,
    /// Not for the guest's use.
    Reserved = 2,
    /// ACPI tables.
    Acpi = 3,
    /// ACPI non-volatile storage.
    Nvs = 4,
    /// Faulty memory.
    Unusable = 5,
    /// Persistent memory.
    Persistent = 7,
}

impl E820Type {
    /// As Linux's own EFI stub maps the types.
    fn of(ty: MemoryType) -> Self {
        match ty {
            MemoryType::LOADER_CODE
            | MemoryType::LOADER_DATA
            | MemoryType::BOOT_SERVICES_CODE
            | MemoryType::BOOT_SERVICES_DATA
            | MemoryType::CONVENTIONAL => Self::Ram,
            MemoryType::UNUSABLE => Self::Unusable,
            MemoryType::ACPI_RECLAIM => Self::Acpi,
            MemoryType::ACPI_NON_VOLATILE => Self::Nvs,
            MemoryType::PERSISTENT_MEMORY => Self::Persistent,
            _ => Self::Reserved,
        }
    }
}

/// An e820 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// Where.
    pub range: PhysRange,
    /// What.
    pub ty: E820Type,
}

/// The guest's memory map: sorted, no overlaps, neighbours of one kind made one.
#[derive(Clone, Debug)]
pub struct GuestMap {
    regions: Vec<Region, MAX_GUEST_DESCRIPTORS>,
}

impl GuestMap {
    /// Appends a region that lies after all others.
    fn push(&mut self, region: Region) -> Result<(), MapError> {
        if let Some(last) = self.regions.last_mut()
            && (last.ty, last.attributes) == (region.ty, region.attributes)
            && last.range.end() == Some(region.range.start())
        {
            last.range = hull(&last.range, &region.range);
            return Ok(());
        }
        let full = MapError::TooMany { what: "guest descriptors", limit: MAX_GUEST_DESCRIPTORS };
        self.regions.push(region).map_err(|_| full)
    }

    /// All regions, by address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Bytes that [`Self::write_efi`] writes.
    pub fn efi_size(&self) -> usize {
        self.regions.len().saturating_mul(size_of::<Descriptor>())
    }

    /// Writes the EFI memory map, 40-byte descriptors of version [`DESCRIPTOR_VERSION`], to the start of
    /// `out` and gives its length; `None` when `out` is shorter than [`Self::efi_size`].
    pub fn write_efi(&self, out: &mut [u8]) -> Option<usize> {
        let out = out.get_mut(..self.efi_size())?;
        for (slot, region) in out.chunks_exact_mut(size_of::<Descriptor>()).zip(&self.regions) {
            let descriptor = Descriptor {
                ty: region.ty.0.into(),
                padding: 0.into(),
                phys_start: region.range.start().into(),
                virt_start: 0.into(),
                pages: (region.range.len() / PAGE_SIZE).into(),
                attributes: region.attributes.bits().into(),
            };
            slot.copy_from_slice(descriptor.as_bytes());
        }
        Some(self.efi_size())
    }

    /// The same map as e820 entries.
    pub fn e820(&self) -> Result<Vec<E820Entry, MAX_E820>, MapError> {
        let mut out = Vec::<E820Entry, MAX_E820>::new();
        for region in &self.regions {
            let ty = E820Type::of(region.ty);
            match out.last_mut() {
                Some(last) if last.ty == ty && last.range.end() == Some(region.range.start()) => {
                    last.range = hull(&last.range, &region.range);
                }
                _ => out
                    .push(E820Entry { range: region.range, ty })
                    .map_err(|_| MapError::TooMany { what: "e820 entries", limit: MAX_E820 })?,
            }
        }
        Ok(out)
    }

    /// What the guest uses as RAM: exactly what devices may reach.
    pub fn ram(&self) -> impl Iterator<Item = PhysRange> {
        self.regions.iter().filter(|r| E820Type::of(r.ty) == E820Type::Ram).map(|r| r.range)
    }

    /// Bytes of RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.ram().fold(0, |sum, r| sum.saturating_add(r.len()))
    }

    /// Whether all of `range` is free memory.
    pub fn is_free(&self, range: &PhysRange) -> bool {
        // Neighbours may differ in attributes, so a free range may span several regions.
        let mut at = range.start();
        for region in self.free() {
            if region.contains_addr(at) {
                match region.end() {
                    Some(end) if region.last() < range.last() => at = end,
                    _ => return true,
                }
            }
        }
        false
    }

    fn free(&self) -> impl Iterator<Item = PhysRange> {
        self.regions.iter().filter(|r| r.ty == MemoryType::CONVENTIONAL).map(|r| r.range)
    }

    /// The lowest free range of `size` bytes, aligned to `align` (a power of two), inside `within` and
    /// clear of `avoid`. It lies in one region.
    pub fn find_free(
        &self,
        size: u64,
        align: u64,
        within: &PhysRange,
        avoid: &[PhysRange],
    ) -> Option<PhysRange> {
        for region in self.free() {
            let mut from = region.start().max(within.start());
            let last = region.last().min(within.last());
            while let Some(range) =
                from.checked_next_multiple_of(align).and_then(|start| PhysRange::new(start, size))
            {
                if range.last() > last {
                    break;
                }
                let Some(obstacle) = avoid.iter().find(|a| a.overlaps(&range)) else {
                    return Some(range);
                };
                let Some(next) = obstacle.end() else { break };
                from = next;
            }
        }
        None
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn descriptor(ty: u32, start: u64, pages: u64, attributes: u64) -> Descriptor {
        Descriptor {
            ty: ty.into(),
            padding: 0.into(),
            phys_start: start.into(),
            virt_start: 0.into(),
            pages: pages.into(),
            attributes: attributes.into(),
        }
    }

    pub(crate) fn map_of(list: &[Descriptor]) -> Result<MemoryMap, MapError> {
        MemoryMap::parse(list.as_bytes(), 40, 1)
    }

    const RT: u64 = 1 << 63;

    fn range(start: u64, len: u64) -> PhysRange {
        PhysRange::new(start, len).unwrap()
    }

    #[test]
    fn the_layout_is_the_specifications() {
        use core::mem::offset_of;
        use uefi_raw::table::boot::MemoryDescriptor as Efi;
        assert_eq!(size_of::<Descriptor>(), size_of::<Efi>());
        assert_eq!(offset_of!(Descriptor, phys_start), offset_of!(Efi, phys_start));
        assert_eq!(offset_of!(Descriptor, pages), offset_of!(Efi, page_count));
        assert_eq!(offset_of!(Descriptor, attributes), offset_of!(Efi, att));
    }

    #[test]
    fn bad_maps_are_refused_by_name() {
        let one = [descriptor(7, 0x1000, 1, 8)];
        let b = one.as_bytes();
        assert_eq!(MemoryMap::parse(b, 40, 2).unwrap_err(), MapError::Version(2));
        assert_eq!(MemoryMap::parse(b, 39, 1).unwrap_err(), MapError::DescriptorSize(39));
        assert_eq!(MemoryMap::parse(b, 0, 1).unwrap_err(), MapError::DescriptorSize(0));
        assert_eq!(MemoryMap::parse(b, u32::MAX, 1).unwrap_err(), MapError::DescriptorSize(u32::MAX));
        assert_eq!(MemoryMap::parse(b, 48, 1).unwrap_err(), MapError::Size { size: 40, descriptor: 48 });
        assert_eq!(MemoryMap::parse(&[], 48, 1).unwrap_err(), MapError::Size { size: 0, descriptor: 48 });
        assert_eq!(
            map_of(&[descriptor(7, 0x1001, 1, 8)]).unwrap_err(),
            MapError::Unaligned { index: 0, start: 0x1001 }
        );
        for (start, pages) in [(0x1000, u64::MAX), (0x1000, 1 << 52), (PHYS_LIMIT, 1), (!0xfff, 1)] {
            assert_eq!(
                map_of(
                    &one.iter()
                        .copied()
                        .chain([descriptor(7, start, pages, 8)])
                        .collect::<std::vec::Vec<_>>()
                )
                .unwrap_err(),
                MapError::PastEnd { index: 1, start, pages }
            );
        }
        assert!(matches!(
            map_of(&[descriptor(7, 0x3000, 1, 8), descriptor(6, 0x1000, 3, 8)]).unwrap_err(),
            MapError::Overlap(..)
        ));
        let many: std::vec::Vec<_> = (0..385).map(|i| descriptor(7, i * 0x2000, 1, 8)).collect();
        assert!(map_of(&many[..384]).is_ok());
        assert!(matches!(map_of(&many).unwrap_err(), MapError::TooMany { limit: 384, .. }));
    }

    #[test]
    fn long_descriptors_and_empty_ones_are_read() {
        let mut bytes = std::vec::Vec::new();
        for d in [descriptor(7, 0x2000, 1, 8), descriptor(7, 0, 0, 8), descriptor(4, 0x1000, 1, 8)] {
            bytes.extend_from_slice(d.as_bytes());
            bytes.extend_from_slice(&[0xee; 8]);
        }
        let map = MemoryMap::parse(&bytes, 48, 1).unwrap();
        assert_eq!(
            map.regions().iter().map(|r| r.range.start()).collect::<std::vec::Vec<_>>(),
            [0x1000, 0x2000]
        );
    }

    #[test]
    fn firmware_may_not_claim_the_mle_for_itself() {
        let mle = range(0x20_0000, 0x20_0000);
        for (ty, attr) in [(6, RT | 8), (5, 8), (11, RT)] {
            let map = map_of(&[descriptor(7, 0, 0x200, 8), descriptor(ty, 0x20_0000, 0x200, attr)]).unwrap();
            assert!(matches!(map.check_runtime(&[mle]), Err(MapError::RuntimeForbidden { .. })));
            assert!(matches!(
                map.guest(&[CarveOut { range: mle, usage: Use::Reserved }]),
                Err(MapError::CarveOutPlace { at: 0x20_0000, .. })
            ));
        }
        let map = map_of(&[descriptor(0, 0x20_0000, 0x200, 8)]).unwrap();
        assert!(map.check_runtime(&[mle]).is_ok());
        assert!(map.guest(&[CarveOut { range: mle, usage: Use::Reserved }]).is_ok());
        assert!(map.guest(&[CarveOut { range: mle, usage: Use::Tables }]).is_err());
    }

    #[test]
    fn carve_outs_that_disagree_are_refused() {
        let map = map_of(&[descriptor(7, 0, 16, 8)]).unwrap();
        let log = CarveOut { range: range(0x1000, 0x100), usage: Use::Reserved };
        let near = CarveOut { range: range(0x1f00, 0x100), usage: Use::Loaded };
        assert!(matches!(map.guest(&[log, near]), Err(MapError::CarveOutOverlap(..))));
        let same = CarveOut { usage: Use::Reserved, ..near };
        assert_eq!(map.guest(&[log, same]).unwrap().regions().len(), 3);
        assert!(matches!(map.guest(&[log; 33]), Err(MapError::TooMany { .. })));
    }

    #[test]
    fn free_memory_is_found_beside_what_is_to_be_avoided() {
        let map = map_of(&[descriptor(7, 0, 0x100, 8), descriptor(7, 0x10_0000, 0x100, 9)]).unwrap();
        let map = map.guest(&[]).unwrap();
        let all = range(0, 1 << 40);
        assert_eq!(map.find_free(0x1000, 0x1000, &all, &[]), Some(range(0, 0x1000)));
        assert_eq!(
            map.find_free(0x1000, 0x1000, &all, &[range(0, 0x1001), range(0x2000, 1)]),
            Some(range(0x3000, 0x1000))
        );
        assert_eq!(
            map.find_free(0x10_0000, 0x1000, &range(1, 1 << 40), &[]),
            Some(range(0x10_0000, 0x10_0000))
        );
        assert_eq!(map.find_free(0x20_1000, 0x1000, &all, &[]), None);
        assert_eq!(map.find_free(0x1000, 0x1000, &all, &[range(0, u64::MAX)]), None);
        assert!(map.is_free(&range(0xff000, 0x2000)));
        assert!(!map.is_free(&range(0x1f_f000, 0x2000)));
        assert!(!map.is_free(&range(0x8000_0000, 1)));
    }

    #[test]
    fn neighbours_become_one_and_too_many_entries_are_an_error() {
        let map = map_of(&[
            descriptor(7, 0, 4, 8),
            descriptor(4, 0x4000, 4, 8),
            descriptor(2, 0x8000, 4, 8),
            descriptor(9, 0xc000, 4, 8),
        ])
        .unwrap();
        let guest = map.guest(&[]).unwrap();
        assert_eq!(guest.regions().len(), 2);
        assert_eq!(guest.ram_bytes(), 0xc000);
        let many: std::vec::Vec<_> = (0..129).map(|i| descriptor(7, i * 0x2000, 1, 8)).collect();
        assert!(map_of(&many[..128]).unwrap().guest(&[]).unwrap().e820().is_ok());
        assert!(map_of(&many).unwrap().guest(&[]).unwrap().e820().is_err());
    }

    /// What the guest must be told of a page, worked out page by page.
    fn expected(map: &MemoryMap, carve_outs: &[CarveOut], page: u64) -> Option<(u32, bool)> {
        let at = page * PAGE_SIZE;
        let region = map.regions().iter().find(|r| r.range.contains_addr(at))?;
        if let Some(c) = carve_outs.iter().find(|c| c.range.page_outward().contains_addr(at)) {
            return Some(match c.usage {
                Use::Reserved => (0, false),
                Use::Loaded => (2, false),
                Use::Thunks => (5, true),
                Use::Tables => (6, true),
            });
        }
        Some(match region.ty.0 {
            _ if region.is_runtime() => (0, false),
            1..=4 | 7 => (7, false),
            other => (other, false),
        })
    }

    const PAGES: u64 = 160;

    fn descriptors() -> impl Strategy<Value = std::vec::Vec<Descriptor>> {
        proptest::collection::vec((0u64..4, 1u64..12, 0u32..16, proptest::bool::weighted(0.3)), 1..24)
            .prop_map(|list| {
                let mut at = 0;
                let mut out = std::vec::Vec::new();
                for (gap, pages, ty, runtime) in list {
                    at += gap;
                    // Most of it is RAM, so that carve-outs find room.
                    let ty = if ty > 11 { 7 } else { ty };
                    let attr = 8 | if runtime && matches!(ty, 5 | 6 | 7 | 11) { RT } else { 0 };
                    out.push(descriptor(ty, at * PAGE_SIZE, pages, attr));
                    at += pages;
                }
                out
            })
            .prop_shuffle()
    }

    fn carve_outs() -> impl Strategy<Value = std::vec::Vec<CarveOut>> {
        proptest::collection::vec((0u64..PAGES * PAGE_SIZE, 1u64..3 * PAGE_SIZE, 0u8..4), 0..4).prop_map(
            |l| {
                l.into_iter()
                    .map(|(start, len, usage)| CarveOut {
                        range: range(start, len),
                        usage: match usage {
                            0 => Use::Reserved,
                            1 => Use::Loaded,
                            2 => Use::Thunks,
                            _ => Use::Tables,
                        },
                    })
                    .collect()
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        #[test]
        fn the_guests_maps_are_right_page_by_page_and_agree(list in descriptors(), carve_outs in carve_outs()) {
            let map = map_of(&list).unwrap();
            // Drop what does not fit one by one: refused carve-outs have a test of their own.
            let mut fit = std::vec::Vec::new();
            for c in carve_outs {
                fit.push(c);
                if map.guest(&fit).is_err() {
                    fit.pop();
                }
            }
            let guest = map.guest(&fit).unwrap();
            let e820 = guest.e820().unwrap();
            let mut bytes = std::vec![0u8; guest.efi_size()];
            prop_assert_eq!(guest.write_efi(&mut bytes), Some(bytes.len()));
            // What Linux will read is the map we hold.
            let reread = MemoryMap::parse(&bytes, 40, 1).unwrap();
            prop_assert_eq!(reread.regions(), guest.regions());
            for page in 0..8 * PAGES {
                let at = page * PAGE_SIZE;
                let found = guest.regions().iter().find(|r| r.range.contains_addr(at));
                let shown = found.map(|r| (r.ty.0, r.attributes.contains(MemoryAttribute::RUNTIME)));
                prop_assert_eq!(shown, expected(&map, &fit, page), "page {}", page);
                let entry = e820.iter().find(|e| e.range.contains_addr(at)).map(|e| e.ty);
                prop_assert_eq!(entry, found.map(|r| E820Type::of(r.ty)));
                let ram = guest.ram().any(|r| r.contains_addr(at));
                prop_assert_eq!(ram, entry == Some(E820Type::Ram));
                if ram {
                    prop_assert!(map.runtime_at(at).is_none());
                    prop_assert!(!fit.iter().any(|c| c.usage != Use::Loaded && c.range.contains_addr(at)));
                }
            }
            if let Some(free) = guest.find_free(0x2000, 0x2000, &range(0, 1 << 40), &[range(0x4000, 0x800)]) {
                prop_assert!(guest.is_free(&free) && !free.overlaps(&range(0x4000, 0x800)));
                prop_assert_eq!(free.start() % 0x2000, 0);
            }
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), size in 0u32..80) {
            let _ = MemoryMap::parse(&bytes, size, 1);
        }
    }
}
