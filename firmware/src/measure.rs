//! What of the firmware is measured into PCR 19, and under which names.
//!
//! Runtime code and data as they are at launch, and the ACPI tables: all that firmware gives the running
//! system to execute or to believe. Not the FACS, which firmware and guest write to. Of memory-mapped devices (the flash with the
//! variables) only where they are: what they hold changes by design, and a read may have an effect.

use core::fmt::{self, Write};

use heapless::{String, Vec};
use hv::addr::{PhysRange, sort_by_range};

use crate::acpi::{MAX_TABLES, Signature, Tables};
use crate::memmap::{MAX_DESCRIPTORS, MemoryMap, MemoryType};
use crate::tables::TablesError;

/// Most items.
pub const MAX_ITEMS: usize = MAX_DESCRIPTORS.saturating_add(MAX_TABLES);
/// Longest name in bytes.
pub const NAME_MAX: usize = 64;
/// The BIOS area, which is in no EFI memory map: old firmware keeps ACPI tables there.
const BIOS_AREA: (u64, u64) = (0xe_0000, 0xf_ffff);

/// What kind of memory is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Code of runtime services.
    RuntimeCode,
    /// Data of runtime services.
    RuntimeData,
    /// Registers of a device that runtime services use: their name is measured, not what they hold.
    RuntimeDevice,
    /// An ACPI table with this signature.
    Acpi([u8; 4]),
}

/// A piece of memory to measure. Its [`fmt::Display`] form is the event's data in the log:
/// `runtime code 0x…-0x…`, `runtime data 0x…-0x…`, `runtime device 0x…-0x…`, `ACPI SSDT 0x…-0x…`, with first and last address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// What it is.
    pub kind: Kind,
    /// Where it lies.
    pub range: PhysRange,
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::RuntimeCode => f.write_str("runtime code")?,
            Kind::RuntimeData => f.write_str("runtime data")?,
            Kind::RuntimeDevice => f.write_str("runtime device")?,
            Kind::Acpi(signature) => write!(f, "ACPI {}", Signature(signature))?,
        }
        write!(f, " {:#x}-{:#x}", self.range.start(), self.range.last())
    }
}

impl Item {
    /// The event's data.
    pub fn name(&self) -> String<NAME_MAX> {
        let mut name = String::new();
        // The longest form, two full addresses after "runtime device ", has 52 bytes.
        let _ = write!(name, "{self}");
        name
    }
}

/// All items, by address; `acpi` is absent on a machine without ACPI.
pub fn items(map: &MemoryMap, acpi: Option<&Tables>) -> Result<Vec<Item, MAX_ITEMS>, TablesError> {
    let mut items = Vec::new();
    for region in map.runtime() {
        let kind = match region.ty {
            MemoryType::RUNTIME_SERVICES_CODE => Kind::RuntimeCode,
            MemoryType::MMIO | MemoryType::MMIO_PORT_SPACE => Kind::RuntimeDevice,
            // Whatever else firmware keeps for its runtime.
            _ => Kind::RuntimeData,
        };
        // Room for all: MAX_ITEMS is the sum of both lists' limits.
        let _ = items.push(Item { kind, range: region.range });
    }
    for table in acpi.map(Tables::all).unwrap_or_default() {
        let bios = PhysRange::from_last(BIOS_AREA.0, BIOS_AREA.1).is_some_and(|b| b.contains(&table.range));
        if !bios && !map.is_memory(&table.range) {
            let value = table.range.start();
            return Err(TablesError::Field { field: "address of an ACPI table outside memory", value });
        }
        let _ = items.push(Item { kind: Kind::Acpi(table.signature), range: table.range });
    }
    sort_by_range(&mut items, |i| i.range);
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::tests::{RSDP_AT, machine};
    use crate::memmap::tests::{descriptor, map_of};

    const RT: u64 = 1 << 63;

    #[test]
    fn items_come_by_address_with_names_for_the_log() {
        let map = map_of(&[
            descriptor(11, 0xffc0_0000, 0x400, RT),
            descriptor(5, 0x8000, 2, RT),
            descriptor(6, 0, 1, RT),
            descriptor(9, 0x1000, 3, 8),
            descriptor(0, 0xc000, 1, RT),
            descriptor(7, 0xd000, 1, 8),
        ])
        .unwrap();
        let acpi = Tables::read(&machine(true), RSDP_AT).unwrap();
        let names: std::vec::Vec<_> =
            items(&map, Some(&acpi)).unwrap().iter().map(|i| i.name().to_string()).collect();
        assert_eq!(
            names,
            [
                "runtime data 0x0-0xfff",
                "ACPI XSDT 0x1100-0x1143",
                "ACPI FACP 0x2000-0x20eb",
                "ACPI DSDT 0x2400-0x2463",
                "ACPI IVRS 0x2800-0x2863",
                "ACPI MCFG 0x2c00-0x2c63",
                "runtime code 0x8000-0x9fff",
                "runtime data 0xc000-0xcfff",
                "runtime device 0xffc00000-0xffffffff",
            ]
        );
        assert_eq!(items(&map, None).unwrap().len(), 4);
    }

    #[test]
    fn a_table_that_is_a_device_is_not_read() {
        let acpi = Tables::read(&machine(true), RSDP_AT).unwrap();
        for (ty, pages) in [(11, 3), (9, 1)] {
            let map = map_of(&[descriptor(ty, 0x1000, pages, 8)]).unwrap();
            assert!(items(&map, Some(&acpi)).is_err());
        }
    }

    #[test]
    fn the_longest_name_fits() {
        let range = PhysRange::from_last(u64::MAX - 1, u64::MAX).unwrap();
        let item = Item { kind: Kind::RuntimeDevice, range };
        assert_eq!(item.name().as_str(), item.to_string());
        let acpi = Item { kind: Kind::Acpi([0, b'"', 0xff, b'A']), range };
        assert!(acpi.name().starts_with("ACPI ?\"?A 0x"));
    }
}
