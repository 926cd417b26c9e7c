//! Of the table.

use super::*;
use proptest::prelude::*;

fn regions() -> ([PhysRange; 1], [PhysRange; 1]) {
    let range = |start| [PhysRange::new(start, 0x10_0000).unwrap()];
    (range(0x7e00_0000), range(0x7f00_0000))
}

pub(super) fn parse(table: &[u8]) -> Result<Prmt, PrmError> {
    let (code, data) = regions();
    Prmt::parse(table, &code, &data)
}

fn error(table: &[u8]) -> String {
    parse(table).unwrap_err().to_string()
}

pub(super) fn handler(name: u8, entry: u64, data: u64, parameters: u64) -> std::vec::Vec<u8> {
    let mut bytes = std::vec![0, 0, 44, 0];
    bytes.extend([name; 16]);
    [entry, data, parameters].iter().for_each(|a| bytes.extend(a.to_le_bytes()));
    bytes
}

pub(super) fn module(name: u8, handlers: &[std::vec::Vec<u8>]) -> std::vec::Vec<u8> {
    let mut bytes = std::vec![0, 0];
    bytes.extend((38 + 44 * handlers.len() as u16).to_le_bytes());
    bytes.extend([name; 16]);
    bytes.extend([2, 0, 1, 0]);
    bytes.extend((handlers.len() as u16).to_le_bytes());
    bytes.extend([38, 0, 0, 0]);
    bytes.extend(0x7f00_2000u64.to_le_bytes());
    bytes.extend(handlers.concat());
    bytes
}

pub(super) fn table(modules: &[std::vec::Vec<u8>]) -> std::vec::Vec<u8> {
    let body = modules.concat();
    let mut bytes = b"PRMT".to_vec();
    bytes.extend((60 + body.len() as u32).to_le_bytes());
    bytes.extend([0; 28]);
    bytes.extend([0x99; 16]);
    bytes.extend([60, 0, 0, 0]);
    bytes.extend((modules.len() as u32).to_le_bytes());
    bytes.extend(body);
    bytes
}

fn two_modules() -> std::vec::Vec<u8> {
    let first = handler(1, 0x7e00_1000, 0x7f00_0100, 0x7f00_0200);
    let second = handler(2, 0x7e0f_ffff, 0, 0);
    table(&[
        module(0xaa, &[first, second]),
        module(0xbb, &[]),
        module(0xcc, &[handler(3, 0x7e00_0000, 0, 0)]),
    ])
}

fn put(mut table: std::vec::Vec<u8>, at: usize, bytes: &[u8]) -> std::vec::Vec<u8> {
    table[at..at + bytes.len()].copy_from_slice(bytes);
    table
}

/// Every offset as the specification's tables give it.
#[test]
fn bytes_from_the_specification_are_read() {
    #[rustfmt::skip]
    let bytes = [
        b'P', b'R', b'M', b'T', 142, 0, 0, 0,   0, 0x55, b'M', b'S', b'F', b'T', b' ', b' ', // signature, length
        b'T', b'E', b'S', b'T', b'P', b'R', b'M', b'T', 1, 0, 0, 0, b'M', b'S', b'F', b'T',
        1, 0, 1, 0,
        0xdc, 0x2a, 0x58, 0x34, 0x2a, 0x8a, 0x4e, 0x7c, 0xa2, 0x2f, 0xb6, 0x6a, 0x2e, 0x5a, 0x9f, 0x1c, // 36 platform
        60, 0, 0, 0,                            // 52 PrmModuleInfoOffset
        1, 0, 0, 0,                             // 56 PrmModuleInfoCount
        0, 0, 82, 0,                            // module: 0 StructureRevision, 2 StructureLength
        0xdc, 0x2a, 0xd8, 0xdc, 0x15, 0x77, 0x43, 0x4b, 0xbb, 0x2a, 0x38, 0x08, 0xcf, 0x67, 0xd4, 0x4e, // 4 Identifier
        3, 0, 7, 0,                             // 20 MajorRevision, 22 MinorRevision
        1, 0,                                   // 24 HandlerCount
        38, 0, 0, 0,                            // 26 HandlerInfoOffset
        0x00, 0x20, 0x00, 0x7f, 0, 0, 0, 0,     // 30 RuntimeMmioRanges
        0, 0, 44, 0,                            // handler: 0 StructureRevision, 2 StructureLength
        0x68, 0x3a, 0x5a, 0xd5, 0x6d, 0x31, 0x7e, 0x4e, 0x8e, 0x9a, 0x2d, 0x8b, 0x2c, 0x17, 0x5b, 0xcf, // 4 Identifier
        0x00, 0x10, 0x00, 0x7e, 0, 0, 0, 0,     // 20 PhysicalAddress
        0x00, 0x01, 0x00, 0x7f, 0, 0, 0, 0,     // 28 StaticDataBuffer
        0x00, 0x02, 0x00, 0x7f, 0, 0, 0, 0,     // 36 AcpiParameterBuffer
    ];
    assert_eq!(bytes.len(), 142);
    let prmt = parse(&bytes).unwrap();
    assert_eq!(prmt.platform.to_string(), "34582adc-8a2a-7c4e-a22f-b66a2e5a9f1c");
    let (module, handler) = prmt.handlers().next().unwrap();
    assert_eq!(module.guid.to_string(), "dcd82adc-7715-4b43-bb2a-3808cf67d44e");
    assert_eq!((module.version, module.mmio_list), ((3, 7), Some(0x7f00_2000)));
    assert_eq!(handler.guid.to_string(), "d55a3a68-316d-4e7e-8e9a-2d8b2c175bcf");
    assert_eq!(handler.entry, 0x7e00_1000);
    assert_eq!(
        (handler.static_data, handler.acpi_parameters),
        (Some(0x7f00_0100), PhysRange::new(0x7f00_0200, 1024))
    );
    assert_eq!(prmt.find(&handler.guid), Some(handler));
}

#[test]
fn handlers_know_their_module() {
    let prmt = parse(&two_modules()).unwrap();
    let names: std::vec::Vec<_> =
        prmt.handlers().map(|(m, h)| (m.guid.to_bytes()[0], h.guid.to_bytes()[0])).collect();
    assert_eq!(names, [(0xaa, 1), (0xaa, 2), (0xcc, 3)]);
    assert_eq!(prmt.handlers().nth(1).unwrap().1.static_data, None);
    assert_eq!(prmt.find(&Guid::from_bytes([4; 16])), None);
    assert_eq!(parse(&table(&[])).unwrap().handlers().count(), 0);
}

#[test]
fn every_part_must_lie_in_what_holds_it() {
    let good = two_modules();
    for cut in 0..good.len() {
        assert!(parse(&good[..cut]).is_err(), "{cut}");
    }
    let cases: [(usize, &[u8], &str); 9] = [
        (0, b"X", "PRMT: signature 1414353496, expected 1414353488"),
        (4, &[0xff, 0xff], "PRMT: end at 0xffff goes past 0x132 bytes"),
        (4, &[61, 0], "PRMT: module at 0x3c goes past 0x3d bytes"),
        (52, &[59], "PRMT: header over module at 0x3b goes past 0x3c bytes"),
        (52, &[0xff; 4], "PRMT: module at 0xffffffff goes past 0x132 bytes"),
        (62, &[37], "PRMT: module at 0x3c goes past 0x61 bytes"),
        (62, &[0, 0], "PRMT: module at 0x3c goes past 0x3c bytes"),
        (62, &[0xff], "PRMT: module's end at 0x13b goes past 0x132 bytes"),
        (86, &[83], "PRMT: handler at 0x8f goes past 0xba bytes"),
    ];
    for (at, bytes, text) in cases {
        assert_eq!(error(&put(good.clone(), at, bytes)), text);
    }
    assert_eq!(error(&put(good.clone(), 56, &[0xff; 4])), "PRMT: module at 0x132 goes past 0x132 bytes");
}

#[test]
fn other_versions_are_not_guessed_at() {
    let good = two_modules();
    assert_eq!(error(&put(good.clone(), 60, &[1])), "PRMT: module's StructureRevision 1, expected 0");
    assert_eq!(error(&put(good.clone(), 98, &[1])), "PRMT: handler's StructureRevision 1, expected 0");
    assert_eq!(error(&put(good, 100, &[45])), "PRMT: handler's StructureLength 45, expected 44");
}

#[test]
fn addresses_outside_of_the_runtimes_regions_are_refused() {
    let with = |h: std::vec::Vec<u8>| error(&table(&[module(0xaa, &[h])]));
    // In runtime data; behind the code; nowhere.
    assert_eq!(with(handler(1, 0x7f00_0000, 0, 0)), "PRMT: handler at 0x7f000000 is not in a runtime region");
    assert_eq!(with(handler(1, 0x7e10_0000, 0, 0)), "PRMT: handler at 0x7e100000 is not in a runtime region");
    assert_eq!(with(handler(1, 0, 0, 0)), "PRMT: handler at 0x0 is not in a runtime region");
    let text = "PRMT: StaticDataBuffer at 0x1000 is not in a runtime region";
    assert_eq!(with(handler(1, 0x7e00_0000, 0x1000, 0)), text);
    let text = "PRMT: AcpiParameterBuffer at 0xffffffffffffffff is not in a runtime region";
    assert_eq!(with(handler(1, 0x7e00_0000, 0, u64::MAX)), text);
    let text = "PRMT: RuntimeMmioRanges at 0x2000 is not in a runtime region";
    assert_eq!(error(&put(two_modules(), 90, &0x2000u64.to_le_bytes())), text);
    assert_eq!(parse(&put(two_modules(), 90, &[0; 8])).unwrap().handlers().next().unwrap().0.mmio_list, None);
}

#[test]
fn limits_and_names_used_twice_are_errors() {
    let many = |n: u8| (0..n).map(|i| handler(i, 0x7e00_0000, 0, 0)).collect::<std::vec::Vec<_>>();
    assert_eq!(parse(&table(&[module(0xaa, &many(32))])).unwrap().handlers().count(), 32);
    assert_eq!(error(&table(&[module(0xaa, &many(33))])), "PRMT: more than 32 handlers");
    let modules: std::vec::Vec<_> = (0..17).map(|i| module(i, &[])).collect();
    assert!(parse(&table(&modules[..16])).is_ok());
    assert_eq!(error(&table(&modules)), "PRMT: more than 16 modules");
    let twice = table(&[module(0xaa, &many(1)), module(0xbb, &many(1))]);
    assert_eq!(error(&twice), "PRMT: two handlers 00000000-0000-0000-0000-000000000000");
}

#[test]
fn parameters_end_where_others_begin() {
    let h = |name, at| handler(name, 0x7e00_0000, 0, at);
    // Out of order, one twice, one at the end of its region.
    let all = [h(1, 0x7f00_0f00), h(2, 0x7f00_0e00), h(3, 0x7f00_0f00), h(4, 0x7f0f_fff8), h(5, 0)];
    let prmt = parse(&table(&[module(0xaa, &all)])).unwrap();
    let of = |name| prmt.find(&Guid::from_bytes([name; 16])).unwrap().acpi_parameters;
    let range = |start, len| PhysRange::new(start, len);
    assert_eq!([of(1), of(2)], [range(0x7f00_0f00, 1024), range(0x7f00_0e00, 0x100)]);
    assert_eq!([of(3), of(4), of(5)], [range(0x7f00_0f00, 1024), range(0x7f0f_fff8, 8), None]);
    assert_eq!(prmt.pages(), [0x7f00_0000, 0x7f00_1000, 0x7f0f_f000]);
    let many: std::vec::Vec<_> = (0..17).map(|n| h(n, 0x7f00_0000 + u64::from(n) * 0x1000)).collect();
    assert!(parse(&table(&[module(0xaa, &many[..16])])).is_ok());
    assert_eq!(error(&table(&[module(0xaa, &many)])), "PRMT: more than 16 pages of parameters");
}

#[test]
fn the_guests_table_leads_to_thunks_and_names_no_buffer() {
    const THUNKS: u64 = 0x20_4000;
    let prmt = parse(&two_modules()).unwrap();
    let mut out = [0; SHOWN_MAX];
    let used = prmt.write_shown(THUNKS, &mut out).unwrap();
    let shown = &out[..used];
    assert_eq!(shown.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    let page = [PhysRange::new(THUNKS, PAGE_SIZE).unwrap()];
    let seen = Prmt::parse(shown, &page, &[]).unwrap();
    assert_eq!((seen.platform, &seen.header[2..]), (prmt.platform, &prmt.header[2..]));
    let names =
        |prmt: &Prmt| prmt.handlers().map(|(m, h)| (m.guid, m.version, h.guid)).collect::<std::vec::Vec<_>>();
    assert_eq!(names(&seen), names(&prmt));
    assert_eq!(seen.modules.len(), 2, "the one without handlers is left out");
    for ((module, handler), n) in seen.handlers().zip(0..) {
        assert_eq!(handler.entry, THUNKS + (14 + n) * 16);
        assert_eq!((handler.static_data, handler.acpi_parameters, module.mmio_list), (None, None, None));
    }
}

proptest! {
    #[test]
    fn no_table_panics_and_no_address_escapes(
        changes in proptest::collection::vec((0usize..306, any::<u8>()), 0..6),
        small in proptest::collection::vec((0usize..306, 0u8..60), 0..3),
    ) {
        let mut bytes = two_modules();
        changes.into_iter().chain(small).for_each(|(at, byte)| bytes[at] = byte);
        let (code, data) = regions();
        if let Ok(prmt) = parse(&bytes) {
            for (module, handler) in prmt.handlers() {
                prop_assert!(code[0].contains_addr(handler.entry));
                for buffer in [handler.static_data, module.mmio_list].into_iter().flatten() {
                    prop_assert!(code[0].contains_addr(buffer) || data[0].contains_addr(buffer));
                }
                if let Some(buffer) = handler.acpi_parameters {
                    prop_assert!(code[0].contains(&buffer) || data[0].contains(&buffer));
                    prop_assert!(buffer.len() <= PARAMETERS_MAX as u64);
                }
            }
        }
    }
}
