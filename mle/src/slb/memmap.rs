//! The EFI memory map, read where it lies. It is the loader's word: it keeps an honest loader's mistake from
//! going further, and proves nothing against a hostile one.

use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// EFI_MEMORY_DESCRIPTOR.
///
/// Spec: \[UEFI\] "EFI_BOOT_SERVICES.GetMemoryMap()".
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Descriptor {
    kind: U32,
    pad: U32,
    start: U64,
    virtual_start: U64,
    pages: U64,
    attributes: U64,
}

const DESCRIPTOR: u64 = size_of::<Descriptor>() as u64;
/// Longest descriptor we step over.
const DESCRIPTOR_MAX: u64 = 256;
/// Longest map read: thousands of descriptors.
const MAP_MAX: u64 = 1 << 20;

/// EfiReservedMemoryType: what neither firmware nor OS uses.
const RESERVED: u32 = 0;
/// EfiLoaderCode to EfiBootServicesData.
const LOADER_AND_BOOT: core::ops::RangeInclusive<u32> = 1..=4;
/// EfiConventionalMemory.
const CONVENTIONAL: u32 = 7;
/// EfiACPIReclaimMemory and EfiACPIMemoryNVS.
const ACPI: core::ops::RangeInclusive<u32> = 9..=10;

/// For whom a piece of memory is to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// The MLE alone, for good.
    Mle,
    /// Data handed over: any RAM but the firmware's runtime regions and what is broken.
    Data,
}

impl Use {
    fn allows(self, kind: u32) -> bool {
        match self {
            Self::Mle => kind == RESERVED,
            Self::Data => {
                kind == RESERVED
                    || kind == CONVENTIONAL
                    || LOADER_AND_BOOT.contains(&kind)
                    || ACPI.contains(&kind)
            }
        }
    }
}

/// Where the map is; all three from the loader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    /// The descriptors.
    pub range: PhysRange,
    /// Bytes from one to the next.
    pub descriptor_size: u32,
}

impl MemoryMap {
    /// Whether one descriptor of a kind that suits `purpose` holds all of `range`. An unreadable or odd map lists
    /// nothing.
    pub fn lists(&self, mem: &impl PhysMem, range: &PhysRange, purpose: Use) -> bool {
        let step = u64::from(self.descriptor_size);
        if !(DESCRIPTOR..=DESCRIPTOR_MAX).contains(&step) || self.range.len() > MAP_MAX {
            return false;
        }
        let mut at = self.range.start();
        while at.saturating_add(step.wrapping_sub(1)) <= self.range.last() {
            let mut descriptor = Descriptor::new_zeroed();
            if !mem.read(at, descriptor.as_mut_bytes()) {
                return false;
            }
            let bytes = descriptor.pages.get().checked_mul(PAGE_SIZE);
            let memory = bytes.and_then(|bytes| PhysRange::new(descriptor.start.get(), bytes));
            if purpose.allows(descriptor.kind.get()) && memory.is_some_and(|memory| memory.contains(range)) {
                return true;
            }
            at = at.saturating_add(step);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slb::fake::Memory;

    fn range(start: u64, len: u64) -> PhysRange {
        PhysRange::new(start, len).unwrap()
    }

    fn map(descriptors: &[(u32, u64, u64)]) -> (Memory, MemoryMap) {
        let mut bytes = Vec::new();
        for (kind, start, pages) in descriptors {
            let mut descriptor = Descriptor::new_zeroed();
            descriptor.kind.set(*kind);
            descriptor.start.set(*start);
            descriptor.pages.set(*pages);
            bytes.extend_from_slice(descriptor.as_bytes());
            bytes.extend_from_slice(&[0xff; 8]);
        }
        let range = range(0x10_0000, bytes.len() as u64);
        (Memory::with(0x10_0000, &bytes), MemoryMap { range, descriptor_size: 48 })
    }

    #[test]
    fn one_descriptor_of_the_right_kind_must_hold_all() {
        let (mem, map) = map(&[(7, 0x200_0000, 0x100), (0, 0x210_0000, 0x100), (0, 0x220_0000, 0x100)]);
        assert!(map.lists(&mem, &range(0x210_0000, 0x10_0000), Use::Mle));
        assert!(!map.lists(&mem, &range(0x210_0000, 0x10_0001), Use::Mle));
        assert!(!map.lists(&mem, &range(0x200_0000, 0x1000), Use::Mle));
        assert!(map.lists(&mem, &range(0x200_0000, 0x1000), Use::Data));
    }

    #[test]
    fn runtime_unusable_and_device_memory_suits_nobody() {
        for kind in [5, 6, 8, 11, 12, 13, 14, 0x8000_0000] {
            let (mem, map) = map(&[(kind, 0x200_0000, 0x100)]);
            assert!(!map.lists(&mem, &range(0x200_0000, 0x1000), Use::Data), "{kind}");
        }
    }

    #[test]
    fn a_map_that_wraps_or_is_cut_or_is_not_there_lists_nothing() {
        let wanted = range(0x200_0000, 0x1000);
        let (mem, good) = map(&[(0, 0x200_0000, u64::MAX)]);
        assert!(!good.lists(&mem, &wanted, Use::Mle));
        let (mem, good) = map(&[(0, 0x200_0000, 0x100)]);
        assert!(good.lists(&mem, &wanted, Use::Mle));
        for bad in [
            MemoryMap { descriptor_size: 0, ..good },
            MemoryMap { descriptor_size: 39, ..good },
            MemoryMap { descriptor_size: u32::MAX, ..good },
            MemoryMap { range: range(0x10_0000, 47), ..good },
            MemoryMap { range: range(0x7000_0000, 48), ..good },
            MemoryMap { range: range(0x10_0000, u64::MAX / 2), ..good },
        ] {
            assert!(!bad.lists(&mem, &wanted, Use::Mle), "{bad:?}");
        }
    }
}
