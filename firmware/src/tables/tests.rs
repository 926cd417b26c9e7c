use super::*;
use crate::memmap::tests::{descriptor, map_of};
use crate::testmem::Ram;
use core::mem::offset_of;
use proptest::prelude::*;
use uefi_raw::table::system::SystemTable as Efi;

#[test]
fn layouts_are_the_specifications() {
    assert_eq!(offset_of!(SystemTable, vendor), offset_of!(Efi, firmware_vendor));
    assert_eq!(offset_of!(SystemTable, firmware_revision), offset_of!(Efi, firmware_revision));
    assert_eq!(offset_of!(SystemTable, runtime), offset_of!(Efi, runtime_services));
    assert_eq!(offset_of!(SystemTable, config_count), offset_of!(Efi, number_of_configuration_table_entries));
    assert_eq!(offset_of!(SystemTable, config), offset_of!(Efi, configuration_table));
    assert_eq!(size_of::<SystemTable>(), size_of::<Efi>());
    assert_eq!(size_of::<RuntimeTable>(), size_of::<uefi_raw::table::runtime::RuntimeServices>());
    assert_eq!((size_of::<Anchor3>(), offset_of!(Anchor3, address)), (24, 16));
    assert_eq!((size_of::<Anchor2>(), offset_of!(Anchor2, intermediate)), (31, 16));
    assert_eq!((offset_of!(Anchor2, table_length), offset_of!(Anchor2, address)), (22, 24));
}

const SYSTAB: u64 = 0x10_0000;
const RUNTIME: u64 = 0x10_0100;
const CONFIG: u64 = 0x10_0200;
const VENDOR: u64 = 0x10_0400;

/// Memory of a firmware: tables at 1 MiB (runtime data), code behind, ACPI, free memory.
fn firmware(config: &[(Guid, u64)]) -> (Ram, MemoryMap) {
    let ram = Ram::new(0x10_0000, 0x8000);
    let header = |signature: u64, size: usize| TableHeader {
        signature: signature.into(),
        revision: 0x0002_0046.into(),
        size: (size as u32).into(),
        crc: 0.into(),
        reserved: 0.into(),
    };
    let system = SystemTable {
        header: header(SYSTEM_TABLE_SIGNATURE, 0x78),
        vendor: VENDOR.into(),
        firmware_revision: 0x1_0000.into(),
        padding: 0.into(),
        consoles: [1.into(); 6],
        runtime: RUNTIME.into(),
        boot: 0.into(),
        config_count: (config.len() as u64).into(),
        config: CONFIG.into(),
    };
    let runtime = RuntimeTable {
        header: header(RUNTIME_SIGNATURE, 0x88),
        services: core::array::from_fn(|i| (0x10_1000 + 16 * i as u64).into()),
    };
    assert!(ram.write(SYSTAB, system.as_bytes()) && ram.write(RUNTIME, runtime.as_bytes()));
    for (i, (guid, address)) in config.iter().enumerate() {
        let entry = ConfigTable { guid: guid.to_bytes(), address: (*address).into() };
        assert!(ram.write(CONFIG + 24 * i as u64, entry.as_bytes()));
    }
    let vendor: std::vec::Vec<u8> = "ED\u{1b}K".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(ram.write(VENDOR, &vendor));
    let map = map_of(&[
        descriptor(6, 0x10_0000, 1, 1 << 63),
        descriptor(5, 0x10_1000, 1, 1 << 63),
        descriptor(9, 0x10_2000, 1, 8),
        descriptor(10, 0x10_3000, 1, 8),
        descriptor(4, 0x10_4000, 4, 8),
    ])
    .unwrap();
    (ram, map)
}

fn build(config: &[(Guid, u64)], rsdp: Option<u64>) -> Ram {
    let (ram, map) = firmware(config);
    let fw = FirmwareTables::read(&ram, SYSTAB).unwrap();
    let at = 0x20_0000;
    let page = guest_tables(&GuestInput {
        firmware: &fw,
        map: &map,
        at,
        data: PhysRange::new(at, 0x3000).unwrap(),
        thunks: 0x20_4000,
        rt_properties: 0x26ff,
        esrt: None,
        rsdp,
        smbios: None,
        smbios3: Some(0x20_1000),
    });
    let guest = Ram::new(at, 0x5000);
    assert!(guest.write(at, &page) && guest.write(0x20_4000, &thunk_page(HypercallInsn::Vmmcall)));
    guest
}

#[test]
fn the_guest_reads_back_tables_that_lead_to_thunks() {
    let guest = build(&[(ACPI_20, 0x10_2014), (SMBIOS, 0x10_0800)], None);
    let tables = FirmwareTables::read(&guest, 0x20_0000).unwrap();
    assert_eq!((tables.revision, tables.firmware_revision), (0x0002_0046, 0x1_0000));
    assert_eq!(String::from_utf16(&tables.vendor).unwrap(), "ED?K");
    assert_eq!(tables.config(ACPI_20), Some(0x10_2014));
    assert_eq!(tables.config(SMBIOS), None, "the firmware's own lies in a runtime region");
    assert_eq!(tables.config(SMBIOS3), Some(0x20_1000));
    let properties: RtProperties = read_at(&guest, tables.config(RT_PROPERTIES).unwrap(), "").unwrap();
    assert_eq!(properties.as_bytes(), [1, 0, 8, 0, 0xff, 0x26, 0, 0]);
    let attributes: MemoryAttributes =
        read_at(&guest, tables.config(MEMORY_ATTRIBUTES).unwrap(), "").unwrap();
    assert_eq!(attributes.entries[0].phys_start.get(), 0x20_4000);
    assert_eq!(attributes.entries[0].attributes.get(), (1 << 63) | 0x2_0000);
    assert_eq!((attributes.entries[1].pages.get(), attributes.entries[1].ty.get()), (3, 6));
    for service in Service::TABLE {
        let target = Target::Service(service);
        let thunk: [u8; 13] = read_at(&guest, tables.services[service.index()], "").unwrap();
        assert_eq!(thunk[..5], [0xf3, 0x0f, 0x1e, 0xfa, 0xb8]);
        let eax = u32::from_le_bytes(thunk[5..9].try_into().unwrap());
        assert_eq!(Target::from_hypercall(eax), Some(target));
        assert_eq!(thunk[9..], [0x0f, 0x01, 0xd9, 0xc3]);
        assert_eq!(hypercall_address(0x20_4000, target), tables.services[service.index()] + 9);
    }
    // The CRCs, by the definition: over the table with the field zero. 0xcbf43926 is the check value.
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    for (at, len) in [(0x20_0000, 0x78), (0x20_0080, 0x88)] {
        let mut bytes = vec![0; len];
        assert!(guest.read(at, &mut bytes));
        let stored = u32::from_le_bytes(bytes[16..20].try_into().unwrap());
        bytes[16..20].fill(0);
        assert_eq!(stored, crc32(&bytes));
    }
}

#[test]
fn the_guest_finds_the_copy_of_the_esrt_and_no_other() {
    let (ram, map) = firmware(&[(ESRT, 0x10_4000)]);
    assert!(ram.write(0x10_4000, &[1, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]));
    let fw = FirmwareTables::read(&ram, SYSTAB).unwrap();
    let copy = Esrt::read(&ram, fw.config(ESRT).unwrap()).unwrap();
    let at = 0x20_0000;
    for esrt in [Some(&copy), None] {
        let page = guest_tables(&GuestInput {
            firmware: &fw,
            map: &map,
            at,
            data: PhysRange::new(at, 0x3000).unwrap(),
            thunks: 0x20_4000,
            rt_properties: 0x3eff,
            esrt,
            rsdp: None,
            smbios: None,
            smbios3: None,
        });
        let guest = Ram::new(at, 0x1000);
        assert!(guest.write(at, &page));
        let found = FirmwareTables::read(&guest, at).unwrap().config(ESRT);
        assert_eq!(found.is_some(), esrt.is_some());
        if let Some(found) = found {
            assert_eq!(Esrt::read(&guest, found).unwrap().bytes(), copy.bytes());
        }
    }
}

#[test]
fn tables_in_memory_the_guest_takes_over_are_left_out() {
    let acpi10 = (ACPI_10, 0x10_2000);
    let tables =
        |config: &[(Guid, u64)], rsdp| FirmwareTables::read(&build(config, rsdp), 0x20_0000).unwrap();
    let t = tables(&[(ACPI_20, 0x10_4000), (TPM_FINAL_EVENTS, 0x10_3000), acpi10], None);
    assert_eq!((t.config(ACPI_20), t.config(TPM_FINAL_EVENTS)), (None, Some(0x10_3000)));
    assert_eq!(t.config(ACPI_10), Some(0x10_2000));
    let t = tables(&[(ACPI_20, 0x10_2000), (TPM_FINAL_EVENTS, 0x10_5000), acpi10], Some(0x20_2000));
    assert_eq!((t.config(ACPI_20), t.config(TPM_FINAL_EVENTS)), (Some(0x20_2000), None));
    assert_eq!(t.config(ACPI_10), None);
}

#[test]
fn only_entry_points_in_runtime_code_count() {
    let (ram, map) = firmware(&[]);
    let fw = FirmwareTables::read(&ram, SYSTAB).unwrap();
    assert_eq!(fw.entry(Service::SetTime, &map), Some(0x10_1010));
    for bad in [0u64, 0x10_0000, 0x10_4000, u64::MAX] {
        assert!(ram.write(RUNTIME + 24, &bad.to_le_bytes()));
        let fw = FirmwareTables::read(&ram, SYSTAB).unwrap();
        assert_eq!(fw.entry(Service::GetTime, &map), None, "{bad:#x}");
    }
}

#[test]
fn bad_firmware_tables_are_refused_by_name() {
    type Check = fn(&TablesError) -> bool;
    let cases: [(u64, &[u8], Check); 6] = [
        (SYSTAB, b"x", |e| matches!(e, TablesError::Field { field: "system table signature", .. })),
        (SYSTAB + 8, &[0xff, 0xff, 1, 0], |e| {
            matches!(e, TablesError::Field { field: "system table revision", .. })
        }),
        (SYSTAB + 0x58, &[0xff; 8], |e| {
            matches!(e, TablesError::Unreadable { what: "runtime services table", .. })
        }),
        (RUNTIME + 12, &[0x87], |e| {
            matches!(e, TablesError::Field { field: "runtime services table size", .. })
        }),
        (SYSTAB + 0x68, &[65], |e| matches!(e, TablesError::TooLarge { limit: 64, .. })),
        (SYSTAB + 0x70, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], |e| {
            matches!(e, TablesError::Unreadable { what: "configuration table", .. })
        }),
    ];
    for (at, bytes, check) in cases {
        let (ram, _) = firmware(&[(ACPI_20, 0)]);
        assert!(ram.write(at, bytes));
        let error = FirmwareTables::read(&ram, SYSTAB).unwrap_err();
        assert!(check(&error), "{error}");
    }
}

#[test]
fn a_vendor_name_at_the_top_of_the_address_space_is_no_name() {
    for address in [0, 1, u64::MAX, u64::MAX - 1] {
        let (ram, _) = firmware(&[]);
        assert!(ram.write(SYSTAB + 0x18, &address.to_le_bytes()));
        assert!(FirmwareTables::read(&ram, SYSTAB).unwrap().vendor.is_empty());
    }
}

fn sums_to_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b)) == 0
}

#[test]
fn smbios_copies_point_to_themselves() {
    let ram = Ram::new(0x1000, 0x2000);
    let mut v3 = *b"_SM3_\0\x18\x03\x03\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0";
    v3[12..16].copy_from_slice(&100u32.to_le_bytes());
    v3[16..24].copy_from_slice(&0x1800u64.to_le_bytes());
    let mut v2 = *b"_SM_\0\x1f\x02\x08\0\0\0\0\0\0\0\0_DMI_\0\0\0\0\0\0\0\x05\0\x28";
    v2[22..24].copy_from_slice(&100u16.to_le_bytes());
    v2[24..28].copy_from_slice(&0x1800u32.to_le_bytes());
    let table: std::vec::Vec<u8> = (0..100).collect();
    assert!(ram.write(0x1000, &v3) && ram.write(0x1100, &v2) && ram.write(0x1800, &table));
    let mut out = [0xee; 256];
    assert_eq!(copy_smbios(&ram, 0x1000, 0x5_0000_0000, &mut out), Ok(132));
    assert_eq!(out[32..132], table);
    assert!(sums_to_zero(&out[..24]));
    assert_eq!(out[16..24], 0x5_0000_0020u64.to_le_bytes());
    assert_eq!(copy_smbios(&ram, 0x1100, 0x8000, &mut out), Ok(132));
    assert!(sums_to_zero(&out[..31]) && sums_to_zero(&out[16..31]));
    assert_eq!(out[24..28], 0x8020u32.to_le_bytes());
    assert!(copy_smbios(&ram, 0x1100, 0x5_0000_0000, &mut out).is_err());
    assert!(matches!(
        copy_smbios(&ram, 0x1000, 0, &mut out[..131]),
        Err(TablesError::TooLarge { value: 100, limit: 99, .. })
    ));
    assert!(copy_smbios(&ram, 0x1800, 0, &mut out).is_err());
    assert!(copy_smbios(&ram, 0xffff_0000, 0, &mut out).is_err());
}

proptest! {
    #[test]
    fn no_tables_panic(changes in proptest::collection::vec((0u64..0x500, any::<u8>()), 0..12)) {
        let (ram, map) = firmware(&[(ACPI_20, 0x10_2000)]);
        for (at, byte) in changes {
            ram.write(SYSTAB + at, &[byte]);
        }
        if let Ok(fw) = FirmwareTables::read(&ram, SYSTAB) {
            let _ = fw.entry(Service::GetTime, &map);
        }
    }

    #[test]
    fn no_smbios_panics(
        kind in prop_oneof![Just(&b"_SM3_"[..]), Just(&b"_SM_\0\x1f"[..])],
        mut bytes in proptest::collection::vec(any::<u8>(), 40),
        room in 0usize..300,
    ) {
        bytes[..kind.len()].copy_from_slice(kind);
        bytes[16..21].copy_from_slice(b"_DMI_");
        let ram = Ram::new(0, 0x100);
        ram.write(0, &bytes);
        let mut out = vec![0; room];
        if let Ok(used) = copy_smbios(&ram, 0, 0, &mut out) {
            prop_assert!(used <= room);
        }
    }
}
