use proptest::prelude::*;

use super::*;
use crate::model::dmar::{Table, scope};
use crate::model::{Machine, walk_dmar};

const BASE: u64 = 0xfed9_0000;

fn problem(table: &[u8]) -> Option<Problem> {
    Dmar::new(table).err().map(|error| error.problem)
}

/// As QEMU 7.2 builds it for q35 with `intel-iommu,intremap=on`, its scopes shortened; typed from a dump.
#[test]
fn reads_the_table_of_qemu() {
    let table = Table::new(39)
        .raw(&[
            0, 0, 0x28, 0, 0, 0, 0, 0, 0, 0, 0xd9, 0xfe, 0, 0, 0, 0, // DRHD
            3, 8, 0, 0, 0, 0xff, 0, 0, // I/O APIC
            1, 8, 0, 0, 0, 0, 0, 0, // 00:00.0
            2, 8, 0, 0, 0, 0, 0x1e, 0, // 00:1e.0, a bridge
            2, 0, 8, 0, 1, 0, 0, 0, // ATSR, all ports
        ])
        .flags(1)
        .finish();
    let dmar = Dmar::new(&table).unwrap();
    assert_eq!((dmar.width(), dmar.flags()), (39, Flags::INTERRUPT_REMAPPING));
    let units: Vec<_> = dmar.units().collect();
    let [unit] = units[..] else { panic!("{units:?}") };
    assert_eq!((unit.base(), unit.size(), unit.segment(), unit.includes_all()), (BASE, 4096, 0, false));
    let scopes: Vec<_> = unit
        .scopes()
        .map(|scope| (scope.kind(), scope.enumeration(), scope.bus(), scope.path().collect::<Vec<_>>()))
        .collect();
    assert_eq!(
        scopes,
        [
            (ScopeKind::IoApic, 0, 0xff, vec![(0, 0)]),
            (ScopeKind::Endpoint, 0, 0, vec![(0, 0)]),
            (ScopeKind::Bridge, 0, 0, vec![(0x1e, 0)]),
        ]
    );
    let ports: Vec<_> = dmar.ats_ports().map(|ports| (ports.all(), ports.segment())).collect();
    assert_eq!(ports, [(true, 0)]);
}

/// One structure of each type, its fields at the offsets of the specification's tables.
#[test]
fn reads_every_kind_of_structure() {
    let table = Table::new(46)
        .flags(0xff)
        .raw(&[0, 0, 16, 0, 1, 3, 2, 0, 0, 0xc0, 0xfb, 0xd0, 1, 0, 0, 0])
        .raw(&[
            1, 0, 32, 0, 0, 0, 2, 0, 0, 0, 0x10, 0x7d, 0, 0, 0, 0, 0xff, 0xff, 0x1f, 0x7d, 0, 0, 0,
            0, //
            1, 8, 0, 0, 0, 0, 0x14, 0,
        ])
        .raw(&[2, 0, 16, 0, 0, 0, 2, 0, 2, 8, 0, 0, 0, 0x80, 3, 0])
        .raw(&[3, 0, 20, 0, 0, 0, 0, 0, 0, 0xc0, 0xfb, 0xd0, 1, 0, 0, 0, 7, 0, 0, 1])
        .raw(&[4, 0, 14, 0, 0, 0, 0, 9, b'\\', b'A', b'.', b'B', 0, 0])
        .raw(&[5, 0, 16, 0, 1, 0, 3, 0, 1, 8, 0, 0, 0, 0xf0, 1, 2])
        .raw(&[0x77, 0x77, 5, 0, 1])
        .raw(&[6, 0, 16, 0, 0, 0, 0, 0, 1, 8, 0, 0, 0, 0, 2, 0])
        .finish();
    let dmar = Dmar::new(&table).unwrap();
    assert_eq!((dmar.width(), dmar.flags()), (46, Flags::all()));
    let unit = dmar.units().next().unwrap();
    assert_eq!(
        (unit.base(), unit.size(), unit.segment(), unit.includes_all(), unit.scopes().count()),
        (0x1_d0fb_c000, 0x8000, 2, true, 0)
    );
    let region = dmar.regions().next().unwrap();
    assert_eq!(region.range(), PhysRange::from_last(0x7d10_0000, 0x7d1f_ffff));
    assert_eq!((region.segment(), region.scopes().count()), (2, 1));
    let ports = dmar.ats_ports().next().unwrap();
    assert_eq!((ports.all(), ports.segment(), ports.scopes().next().unwrap().bus()), (false, 2, 0x80));
    let affinities: Vec<_> = dmar.affinities().collect();
    assert_eq!(affinities, [Affinity { base: 0x1_d0fb_c000, domain: 0x0100_0007 }]);
    let named = dmar.acpi_devices().next().unwrap();
    assert_eq!((named.number(), named.name()), (9, &b"\\A.B"[..]));
    let cached = dmar.ats_devices().next().unwrap();
    assert_eq!((cached.required(), cached.segment(), cached.scopes().count()), (true, 3, 1));
}

#[test]
fn refuses_what_does_not_fit() {
    let unit = |base| Table::new(39).unit(0, 0, base, &[]);
    let region = |start, last| Table::new(39).region(0, start, last, &[]).finish();
    let cases = [
        (Table::new(31).finish(), Problem::Width),
        (Table::new(53).finish(), Problem::Width),
        (Table::new(39).raw(&[0]).finish(), Problem::Length),
        (Table::new(39).raw(&[0x77, 0, 3, 0]).finish(), Problem::Length),
        (Table::new(39).raw(&[0x77, 0, 5, 0]).finish(), Problem::Length),
        (Table::new(39).structure(0, &[0; 11]).finish(), Problem::Length),
        (Table::new(39).structure(1, &[0; 19]).finish(), Problem::Length),
        (Table::new(39).structure(2, &[0; 3]).finish(), Problem::Length),
        (Table::new(39).structure(3, &[0; 15]).finish(), Problem::Length),
        (Table::new(39).structure(4, &[0; 4]).finish(), Problem::Length),
        (Table::new(39).structure(5, &[0; 3]).finish(), Problem::Length),
        (unit(0).finish(), Problem::Base),
        (unit(0xfed9_0800).finish(), Problem::Base),
        (unit(1 << 39).finish(), Problem::Base),
        (unit(BASE).unit(0, 1, BASE, &[]).finish(), Problem::Duplicate),
        (unit(BASE).unit(1, 1, 0x1000, &[]).unit(1, 1, 0x2000, &[]).finish(), Problem::IncludeAll),
        (region(0x1000, 0x1ffe), Problem::Memory),
        (region(0x1800, 0x1fff), Problem::Memory),
        (region(0x2000, 0x1fff), Problem::Memory),
        (region(0x2000, 0xfff), Problem::Memory),
        (region(0x1000, (1 << 39) + 0xfff), Problem::Memory),
        (region(0, u64::MAX), Problem::Memory),
    ];
    for (table, expected) in cases {
        assert_eq!(problem(&table), Some(expected), "{table:x?}");
    }
    for segment in [0, 1] {
        let all = unit(BASE).unit(1, 0, 0x1000, &[]).unit(1, segment, 0x2000, &[]).finish();
        assert_eq!(problem(&all), (segment == 0).then_some(Problem::IncludeAll));
    }

    let good = Table::new(39).finish();
    assert_eq!(problem(&good), None);
    assert_eq!(problem(&good[..47]), Some(Problem::Header));
    assert_eq!(problem(b""), Some(Problem::Header));
    let message = Dmar::new(&unit(0x800).finish()).err().unwrap().to_string();
    assert_eq!(message, "DMAR: register base at offset 48: 0x800 (limit 0x0)");
}

#[test]
fn refuses_scopes_that_do_not_fit() {
    let with = |scopes: &[u8]| problem(&Table::new(39).unit(0, 0, BASE, scopes).finish());
    assert_eq!(with(&scope(1, 0, 0, &[(31, 7), (31, 7)])), None);
    assert_eq!(with(&scope(9, 0, 0, &[(0, 0)])), None);
    for bad in [
        &[1][..],
        &[1, 0, 0, 0, 0, 0],
        &[1, 6, 0, 0, 0, 0],
        &[1, 7, 0, 0, 0, 0, 0],
        &[1, 9, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(with(bad), Some(Problem::Length), "{bad:?}");
    }
    assert_eq!(with(&[1, 10, 0, 0, 0, 0, 0, 0]), Some(Problem::Length));
    assert_eq!(with(&scope(1, 0, 0, &[(32, 0)])), Some(Problem::Path));
    assert_eq!(with(&scope(1, 0, 0, &[(0, 0), (0, 8)])), Some(Problem::Path));
}

#[test]
fn a_path_leads_through_bridges_by_their_bus_numbers() {
    let machine = Machine::new();
    let bridge = |id: u16, secondary: u32| {
        machine.set_config(id, 0, 0x1111_8086);
        machine.set_config(id, 0x0c, 0x0081_0000);
        machine.set_config(id, 0x18, secondary << 8 | 0x2200_0011);
    };
    bridge(0x00e0, 5);
    bridge(0x0508, 9);
    machine.set_config(0x0900, 0, 0x1111_8086);
    machine.set_config(0x0910, 0, 0x1111_8086);
    let resolve = |bus, path: &[(u8, u8)]| {
        let table = Table::new(39).unit(0, 0, BASE, &scope(1, 0, bus, path)).finish();
        let dmar = Dmar::new(&table).unwrap();
        dmar.units().next().unwrap().scopes().next().unwrap().resolve(&machine)
    };
    assert_eq!(resolve(0, &[(0x1c, 0)]), Ok(0x00e0));
    assert_eq!(resolve(0x80, &[(4, 3)]), Ok(0x8023), "the last step need not exist");
    assert_eq!(resolve(0, &[(0x1c, 0), (1, 0)]), Ok(0x0508));
    assert_eq!(resolve(0, &[(0x1c, 0), (1, 0), (2, 1)]), Ok(0x0911));
    assert_eq!(resolve(0, &[(0x1d, 0), (1, 0)]), Err(0x00e8), "no such bridge");
    assert_eq!(resolve(9, &[(0, 0), (1, 0)]), Err(0x0900), "not a bridge");
    bridge(0x00e0, 6);
    assert_eq!(resolve(0, &[(0x1c, 0), (1, 0)]), Ok(0x0608));
}

proptest! {
    #[test]
    fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        walk_dmar(&Table::new(39).raw(&bytes).finish());
    }

    /// Bytes that look like structures get further in.
    #[test]
    fn never_panics_on_likely_tables(
        structures in prop::collection::vec(
            (0u16..7, any::<u8>(), prop::collection::vec(prop_oneof![4 => Just(0u8), 2 => 1..9u8, 1 => any::<u8>()], 0..60)),
            0..6,
        ),
    ) {
        let mut table = Table::new(39);
        for (kind, wrong, body) in structures {
            let length = (body.len() as u16 + 4).saturating_add(u16::from(wrong < 16));
            table = table.raw(&kind.to_le_bytes()).raw(&length.to_le_bytes()).raw(&body);
        }
        walk_dmar(&table.finish());
    }

    /// What a table says is what was put in.
    #[test]
    fn reads_what_was_written(
        units in prop::collection::btree_map(1u64..1 << 27, (any::<u16>(), prop::collection::vec((1u8..6, any::<u8>(), any::<u8>(), prop::collection::vec((0u8..32, 0u8..8), 1..4)), 0..4)), 1..6),
        regions in prop::collection::vec((0u64..1 << 26, 1u64..1 << 20, any::<u16>()), 0..6),
    ) {
        let mut table = Table::new(39);
        for (page, (segment, scopes)) in &units {
            let scopes: Vec<u8> = scopes.iter().flat_map(|(kind, id, bus, path)| scope(*kind, *id, *bus, path)).collect();
            table = table.unit(0, *segment, page << 12, &scopes);
        }
        for (page, pages, segment) in &regions {
            table = table.region(*segment, page << 12, ((page + pages) << 12) - 1, &[]);
        }
        let table = table.finish();
        let dmar = Dmar::new(&table).unwrap();
        let found: Vec<_> = dmar.units().map(|unit| (unit.base() >> 12, unit.segment(), unit.scopes().map(|s| (s.enumeration(), s.bus(), s.path().collect::<Vec<_>>())).collect::<Vec<_>>())).collect();
        let wanted: Vec<_> = units.into_iter().map(|(page, (segment, scopes))| (page, segment, scopes.into_iter().map(|(_, id, bus, path)| (id, bus, path)).collect::<Vec<_>>())).collect();
        prop_assert_eq!(found, wanted);
        let found: Vec<_> = dmar.regions().map(|region| (region.range().unwrap(), region.segment())).collect();
        let wanted: Vec<_> = regions.iter().map(|(page, pages, segment)| (PhysRange::new(page << 12, pages << 12).unwrap(), *segment)).collect();
        prop_assert_eq!(found, wanted);
    }
}

#[test]
fn a_table_of_one_unit_keeps_what_sends_interrupts() {
    let (io_apic, timer) = (scope(3, 2, 0xf0, &[(0x1f, 0)]), scope(4, 0, 0, &[(0x1f, 7)]));
    let graphics = [scope(1, 0, 0, &[(2, 0)]), scope(3, 1, 0xf1, &[(0x1e, 0)])].concat();
    let table = Table::new(46)
        .flags(5)
        .unit(0, 0, 0xfed9_0000, &graphics)
        .unit(1, 0, 0xfed9_1000, &[io_apic.clone(), timer.clone()].concat())
        .region(0, 0x1000, 0x1fff, &scope(1, 0, 0, &[(2, 0)]))
        .finish();
    let mut out = [0xff; 256];
    let used = Dmar::new(&table).unwrap().write_single(0xfee0_1000, &mut out).unwrap();
    let right = Table::new(46).flags(3).unit(
        1,
        0,
        0xfee0_1000,
        &[scope(3, 1, 0xf1, &[(0x1e, 0)]), io_apic, timer].concat(),
    );
    assert_eq!(&out[..used], right.finish());
    let dmar = Dmar::new(&table).unwrap();
    assert_eq!(dmar.write_single(0xfee0_1000, &mut out[..used - 1]), None);
    let table = Table::new(46).unit(1, 0, 0xfed9_0000, &[]).unit(1, 1, 0xfed9_1000, &[]).finish();
    assert_eq!(Dmar::new(&table).unwrap().write_single(0xfee0_1000, &mut out), None);
}
