use proptest::prelude::*;

use super::*;
use crate::model::Table;

const BASE: u64 = 0xfed8_0000;

fn problem(table: &[u8]) -> Option<Problem> {
    Ivrs::new(table).err().map(|error| error.problem)
}

fn entries(bytes: &[u8]) -> Result<Vec<DeviceEntry>, Problem> {
    let table = Table::new().unit(0x11, 2, BASE, 0, bytes).finish();
    let ivrs = Ivrs::new(&table).map_err(|error| error.problem)?;
    Ok(ivrs.units().flat_map(|unit| unit.entries()).collect())
}

/// As QEMU 7.2 builds it for q35 with `amd-iommu,intremap=on`.
#[test]
fn reads_the_table_of_qemu() {
    let devices = [3, 0, 0, 0, 4, 0xff, 0xff, 0, 0x48, 0, 0, 0, 0, 0xa0, 0, 1];
    let table = Table::new().unit(0x10, 0x10, BASE, 0, &devices).finish();
    let ivrs = Ivrs::new(&table).unwrap();
    let units: Vec<_> = ivrs.units().collect();
    let [unit] = units[..] else { panic!("{units:?}") };
    assert_eq!((unit.kind(), unit.device(), unit.capability(), unit.base()), (0x10, 0x10, 0x40, BASE));
    assert_eq!(
        unit.entries().collect::<Vec<_>>(),
        [
            DeviceEntry::RangeStart { device: 0, flags: 0, alias: None },
            DeviceEntry::RangeEnd { device: 0xffff },
            DeviceEntry::Special { device: 0xa0, handle: 0, variety: 1, flags: 0 },
        ]
    );
    assert!(ivrs.lists_io_apic());
}

#[test]
fn the_highest_type_describes_an_iommu() {
    let table = Table::new()
        .unit(0x10, 2, BASE, 0, &[1, 0, 0, 0])
        .unit(0x40, 2, BASE, 0, &[])
        .unit(0x11, 2, BASE, 0, &[])
        .unit(0x10, 0x4002, 0xfec0_0000, 0, &[])
        .finish();
    let ivrs = Ivrs::new(&table).unwrap();
    let found: Vec<_> = ivrs.units().map(|unit| (unit.kind(), unit.device())).collect();
    assert_eq!(found, [(0x40, 2), (0x10, 0x4002)]);

    let twice = Table::new().unit(0x11, 2, BASE, 0, &[]).unit(0x11, 2, BASE, 0, &[]).finish();
    assert_eq!(problem(&twice), Some(Problem::Duplicate));
    let differs = Table::new().unit(0x10, 2, BASE, 0, &[]).unit(0x11, 2, 0xfec0_0000, 0, &[]).finish();
    assert_eq!(problem(&differs), Some(Problem::Contradiction));
    let segments = Table::new().unit(0x11, 2, BASE, 0, &[]).unit(0x11, 2, 0xfec0_0000, 1, &[]).finish();
    assert_eq!(problem(&segments), None);
}

#[test]
fn reads_every_kind_of_device_entry() {
    let acpi = {
        let mut entry = vec![0xf0, 0xa5, 0, 0x40];
        entry.extend(b"AMDI0020");
        entry.extend([0; 8]);
        entry.extend([2, 3, b'a', b'b', b'c']);
        entry
    };
    let bytes = [
        &[1, 0, 0, 7][..],
        &[2, 0x34, 0x12, 3],
        &[0x42, 8, 0, 0, 0, 9, 0, 0],
        &[0x43, 0x10, 0, 0, 0, 9, 0, 0],
        &[0, 0, 0, 0],
        &[4, 0x17, 0, 0],
        &[0x46, 0x18, 0, 1, 0, 0, 0, 0x80],
        &[0x47, 0x20, 0, 1, 0, 0, 0, 0x80],
        &[4, 0x20, 0, 0],
        &[0x48, 0, 0, 0x41, 5, 0xa0, 0, 2],
        &[0x40, 0, 0, 0, 0, 0, 0, 0],
        &[0x3f, 0, 0, 0],
        &acpi,
        &[2, 1, 0, 0],
    ]
    .concat();
    assert_eq!(
        entries(&bytes).unwrap(),
        [
            DeviceEntry::All { flags: 7 },
            DeviceEntry::Select { device: 0x1234, flags: 3, alias: None },
            DeviceEntry::Select { device: 8, flags: 0, alias: Some(9) },
            DeviceEntry::RangeStart { device: 0x10, flags: 0, alias: Some(9) },
            DeviceEntry::Padding,
            DeviceEntry::RangeEnd { device: 0x17 },
            DeviceEntry::Select { device: 0x18, flags: 1, alias: None },
            DeviceEntry::RangeStart { device: 0x20, flags: 1, alias: None },
            DeviceEntry::RangeEnd { device: 0x20 },
            DeviceEntry::Special { device: 0xa0, handle: 5, variety: 2, flags: 0x41 },
            DeviceEntry::Padding,
            DeviceEntry::Unknown { kind: 0x3f },
            DeviceEntry::Acpi { device: 0xa5, flags: 0x40 },
            DeviceEntry::Select { device: 1, flags: 0, alias: None },
        ]
    );
}

#[test]
fn refuses_device_entries_that_do_not_fit() {
    assert_eq!(entries(&[1, 0, 0]), Err(Problem::Length));
    assert_eq!(entries(&[0x42, 0, 0, 0]), Err(Problem::Length));
    assert_eq!(entries(&[0xf0, 0, 0, 0]), Err(Problem::Length));
    assert_eq!(entries(&[0x80, 0, 0, 0]), Err(Problem::EntryType));
    assert_eq!(entries(&[3, 5, 0, 0]), Err(Problem::Range));
    assert_eq!(entries(&[4, 5, 0, 0]), Err(Problem::Range));
    assert_eq!(entries(&[3, 5, 0, 0, 4, 4, 0, 0]), Err(Problem::Range));
    assert_eq!(entries(&[3, 5, 0, 0, 2, 6, 0, 0]), Err(Problem::Range));
    let mut name = [0; 24];
    (name[0], name[21]) = (0xf0, 3);
    assert_eq!(entries(&name), Err(Problem::Length));
}

#[test]
fn reads_memory_blocks() {
    let block = |kind: u8, start: u64, length: u64| {
        let mut bytes = vec![kind, 7, 32, 0, 8, 0, 0x10, 0];
        bytes.extend([0; 8]);
        bytes.extend(start.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes
    };
    let table = Table::new()
        .block(&block(0x20, 0x1000, 0x1000))
        .block(&block(0x21, 0x2000, 0x1000))
        .block(&block(0x22, u64::MAX, 1))
        .finish();
    let ivrs = Ivrs::new(&table).unwrap();
    let found: Vec<_> = ivrs.memory().map(|memory| (memory.first, memory.last, memory.start)).collect();
    assert_eq!(found, [(0, 0xffff, 0x1000), (8, 8, 0x2000), (8, 0x10, u64::MAX)]);
    assert!(ivrs.memory().all(|memory| memory.is_unity() && !memory.is_exclusion()));
    for (start, length) in [(0x1000, 0), (u64::MAX, 2)] {
        let table = Table::new().block(&block(0x20, start, length)).finish();
        assert_eq!(problem(&table), Some(Problem::Memory));
    }
}

#[test]
fn refuses_blocks_that_do_not_fit() {
    for block in [&[0x10, 0, 23, 0][..], &[0x77, 0, 3, 0], &[0x77, 0, 5, 0], &[0x77]] {
        assert_eq!(problem(&Table::new().block(block).finish()), Some(Problem::Length), "{block:x?}");
    }
    assert_eq!(problem(&Table::new().block(&[0x77, 0, 4, 0]).finish()), None);
    let good = Table::new().finish();
    assert_eq!(problem(&good[..47]), Some(Problem::Header));
    assert_eq!(problem(b""), Some(Problem::Header));
    let message = Ivrs::new(&good[..47]).err().unwrap().to_string();
    assert_eq!(message, "IVRS: header: signature or length at offset 0: 0x30 (limit 0x2f)");
}

proptest! {
    #[test]
    fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let table = Table::new().block(&bytes).finish();
        if let Ok(ivrs) = Ivrs::new(&table) {
            let entries = ivrs.units().map(|unit| unit.entries().count()).sum::<usize>();
            prop_assert!(entries + ivrs.memory().count() < 200);
        }
    }

    /// Bytes that look like blocks get further in.
    #[test]
    fn never_panics_on_likely_tables(
        blocks in prop::collection::vec(
            (prop::sample::select(vec![0x10u8, 0x11, 0x40, 0x20, 0x21, 0x22, 0x99]), any::<u8>(), any::<u8>(),
             prop::collection::vec(prop_oneof![Just(0u8), 1..5u8, 0x40..0x49u8, Just(0xf0), any::<u8>()], 0..80)),
            0..6,
        ),
    ) {
        let mut table = Table::new();
        for (kind, flags, shorter, body) in blocks {
            let length = (body.len() as u8 + 4).saturating_sub(if shorter < 32 { shorter } else { 0 });
            let mut block = vec![kind, flags, length, 0];
            block.extend(body);
            table = table.block(&block);
        }
        let table = table.finish();
        if let Ok(ivrs) = Ivrs::new(&table) {
            let ends = |unit: Unit<'_>| unit.entries().last();
            let _ = ivrs.units().filter_map(ends).count();
            let _ = ivrs.memory().count();
        }
    }
}
