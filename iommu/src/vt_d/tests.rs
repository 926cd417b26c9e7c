mod shown;

use std::cell::Cell;
use std::rc::Rc;

use hv::addr::PhysRange;
use hv::radix::{AMD_VI, MemoryType, PageSize, Rights, Tables, VT_D};
use hv::space::{AddressSpace, Kind, View};
use proptest::prelude::*;

use super::defs::reg;
use super::unit::hulls;
use super::*;
use crate::fault::{Access, Drained, Fault, Reason};
use crate::model::dmar::{Table, scope};
use crate::model::vt_d::{Defect, Features, Unit as Model};
use crate::model::{Machine, Pages, Window};

const REGION: u64 = 0x4000_0000;
const REGION_SIZE: u64 = 16 << 20;
/// Memory that only the MLE may write.
const CANARY: u64 = REGION + 0x1000;
/// Memory of the MLE to which the gap directs the unit's log of faults.
const LOG: u64 = REGION + 0x2000;
/// Memory of the gap.
const GAP: u64 = 0x1000_0000;
const BASE: u64 = 0xfed9_0000;
const ATTACKER: u16 = 0x0310;
const GUEST: u64 = 0x0020_0000;
const RW: Rights = Rights::READ.union(Rights::WRITE);
/// MSI data: a fixed interrupt, an SMI, an NMI, an INIT, an ExtINT.
const MSI: [u32; 5] = [0x0030, 0x0200, 0x0400, 0x0500, 0x0700];
const COMPATIBLE_MSI: u64 = 0xfee0_0000;
/// One that a device may be granted.
const INTERRUPT: Interrupt = Interrupt {
    sender: Sender::Device { source: ATTACKER, functions: 0 },
    vector: 0x41,
    destination: 3,
    logical: false,
    one_of: false,
    lowest_priority: false,
    level: false,
};

fn region() -> PhysRange {
    PhysRange::new(REGION, REGION_SIZE).unwrap()
}

fn dma_area() -> DmaArea {
    DmaArea::at_top_of(&region()).unwrap()
}

fn dmar() -> Vec<u8> {
    Table::new(46).unit(1, 0, BASE, &[]).finish()
}

fn with(features: Features) -> Machine {
    let machine = Machine::new();
    machine.add_vt_d(Model::new(BASE, 0..=u16::MAX, features));
    machine
}

fn one_unit() -> Machine {
    with(Features::full())
}

fn launch(machine: &Machine) -> Result<VtD<Window>, Error> {
    deny_all(machine, &dmar(), dma_area(), &[region()], Protection::Set)
}

/// The gap turned everything on that a unit has, with tables of its own that let everything pass, and had `device` use
/// it.
fn gap_left_it_on(machine: &Machine, device: u16) {
    const PASS_THROUGH: u64 = 1 | 2 << 2;
    let bus = u64::from(device >> 8);
    machine.poke64(GAP + bus * 16, (GAP + 0x1000) | 1);
    machine.poke64(GAP + 0x1000 + u64::from(device & 0xff) * 16, PASS_THROUGH);
    machine.with_vt_d(0, |unit| {
        unit.hijack(GAP);
        // Queue, interrupt remapping with compatibility format, the log of faults in memory, messages for events.
        unit.status |= 1 << 26 | 1 << 25 | 1 << 23 | 1 << 28;
        unit.registers.extend([
            (0x90, GAP + 0x2000),
            (0x80, 0),
            (0x88, 0),
            (0xb8, GAP | 15),
            (0x38, 0),
            (0x58, LOG),
        ]);
    });
    assert!(machine.dma_write(device, CANARY, &[0]));
    machine.with_vt_d(0, |unit| assert!(unit.cached_contexts.contains_key(&device)));
}

fn assert_closed(machine: &Machine) {
    machine.peace();
    for device in [0, 1, 0xa0, ATTACKER, 0x1fff, 0xffff] {
        for address in [0, CANARY, dma_area().deny_root(), 0x1000, 0x1_0000_0000 - 8] {
            assert!(!machine.dma_write(device, address, &[1]), "{device:#x} writes {address:#x}");
            assert!(!machine.dma_read(device, address));
        }
        for data in MSI {
            for address in [COMPATIBLE_MSI, remappable(0), remappable(0xffff)] {
                assert!(!machine.dma_write(device, address, &data.to_le_bytes()));
            }
        }
    }
    assert!(machine.interrupts().is_empty());
}

/// Address of an MSI in remappable format.
fn remappable(index: u64) -> u64 {
    0xfee0_0010 | (index & 0x7fff) << 5 | (index >> 15) << 2
}

/// Pages of the MLE region.
fn pages(machine: &Machine) -> Pages<'_> {
    Pages::new(machine, REGION + 0x10_0000, true)
}

/// Tables that map 4 MiB at [`GUEST`].
fn guest_tables(all: &VtD<Window>, pool: &mut Pages<'_>) -> Tables {
    let tables = all.new_tables(39, pool).unwrap();
    let guest = PhysRange::new(GUEST, 4 << 20).unwrap();
    tables.map_identity(pool, guest, RW, MemoryType::WriteBack).unwrap();
    tables
}

fn open<'a>(machine: &'a Machine, interrupts: Interrupts) -> Result<(VtD<Window>, Tables, Pages<'a>), Error> {
    let mut all = launch(machine)?;
    let mut pool = pages(machine);
    let tables = guest_tables(&all, &mut pool);
    all.open_guest(machine, &tables, &pool, &[region()], interrupts)?;
    Ok((all, tables, pool))
}

#[test]
fn a_machine_left_open_is_closed() {
    let machine = one_unit();
    assert!(machine.dma_write(ATTACKER, CANARY, &[1]));
    let all = launch(&machine).unwrap();
    assert_eq!((all.count(), all.unguarded()), (1, 0));
    assert_closed(&machine);
}

#[test]
fn a_unit_that_the_gap_left_on_is_closed() {
    let machine = one_unit();
    gap_left_it_on(&machine, ATTACKER);
    launch(&machine).unwrap();
    assert_closed(&machine);
    machine.with_vt_d(0, |unit| {
        assert_eq!(
            [0x38, 0xa0].map(|register| unit.register(register)),
            [1 << 31; 2],
            "no messages of the unit's own"
        );
    });
    // Nor a log of its own: no region and no table keeps a unit from writing that.
    assert_eq!(machine.peek64(LOG), 0);
    machine.with_vt_d(0, |unit| unit.status |= 1 << 28);
    assert!(!machine.dma_write(ATTACKER, GAP, &[1]));
    assert_eq!(machine.peek64(LOG), GAP);
}

/// An attacker that writes whatever would open a root table to it, after each access, wherever it can; and how often it
/// reached closed memory after the CPU's first write there.
fn attack(machine: &Machine) -> Rc<Cell<u32>> {
    let hits = Rc::new(Cell::new(0));
    let counted = hits.clone();
    machine.watch(region().start()..=region().last());
    machine.attack(move |machine| {
        let bus = u64::from(ATTACKER >> 8) * 16;
        let context = dma_area().guest_context();
        let forged = [
            (dma_area().deny_root() + bus, context | 1),
            (dma_area().guest_root() + bus, context | 1),
            (context + u64::from(ATTACKER & 0xff) * 16, 1 | 2 << 2),
            // In place of any descriptor: nothing is forgotten.
            (dma_area().queue(0), 5 | 1 << 5),
            (CANARY, u64::from_le_bytes(*b"gotcha!!")),
        ];
        for (address, value) in forged {
            if machine.dma_write(ATTACKER, address, &value.to_le_bytes()) && machine.guarding() {
                counted.set(counted.get() + 1);
            }
        }
    });
    hits
}

/// Runs `steps` while the attacker is at work; whether it ever reached closed memory, and whether it does in the end.
fn attack_on(steps: impl Fn(&mut VtD<Window>, &Machine) -> Result<(), Error>) -> (bool, bool) {
    let machine = one_unit();
    gap_left_it_on(&machine, ATTACKER);
    let table = dmar();
    let mut all = VtD::discover(&machine, &Dmar::new(&table).unwrap(), dma_area(), &[region()]).unwrap();
    let hits = attack(&machine);
    let done = steps(&mut all, &machine);
    let reached = hits.get() > 0;
    machine.peace();
    assert!(done.is_ok() || matches!(done, Err(Error::Tampered { .. })), "{done:?}");
    (reached, done.is_ok() && machine.dma_write(ATTACKER, CANARY, b"gotcha!!"))
}

#[test]
fn each_step_is_needed() {
    fn protect(all: &mut VtD<Window>, machine: &Machine) -> Result<(), Error> {
        let table = dmar();
        all.protect(machine, &Dmar::new(&table).unwrap(), &[region()], Protection::Set)
    }
    let all_steps = attack_on(|all, machine| {
        protect(all, machine)?;
        all.stop(machine)?;
        all.write_tables(machine)?;
        all.start(machine)?;
        all.verify(machine)
    });
    assert_eq!(all_steps, (false, false));
    let without_regions = attack_on(|all, machine| {
        all.stop(machine)?;
        all.write_tables(machine)?;
        all.start(machine)
    });
    assert!(without_regions.0);
    let without_stop = attack_on(|all, machine| {
        protect(all, machine)?;
        all.write_tables(machine)
    });
    assert!(without_stop.0);
    // What devices wrote before the regions were on is in force then.
    let without_tables = attack_on(|all, machine| {
        machine.dma_write(ATTACKER, dma_area().guest_context() + 0x100, &[1 | 2 << 2, 0, 0, 0, 0, 0, 0, 0]);
        machine.dma_write(
            ATTACKER,
            dma_area().deny_root() + 0x30,
            &(dma_area().guest_context() | 1).to_le_bytes(),
        );
        protect(all, machine)?;
        all.stop(machine)?;
        all.start(machine)
    });
    assert!(without_tables.1);
}

#[test]
fn what_was_cached_before_is_forgotten() {
    let machine = one_unit();
    gap_left_it_on(&machine, ATTACKER);
    let stale = machine.with_vt_d(0, |unit| unit.cached_pages.clone());
    assert!(!stale.is_empty());
    launch(&machine).unwrap();
    machine.with_vt_d(0, |unit| assert!(unit.cached_pages.is_empty() && unit.cached_contexts.is_empty()));
    machine.with_vt_d(0, |unit| unit.cached_pages = stale);
    assert!(machine.dma_write(ATTACKER, CANARY, &[1]), "a unit that kept it would let the device through");
}

/// Regions go off last; before, and without translation, they are what protects.
#[test]
fn regions_stay_on_until_the_guests_tables_are_in_force() {
    let machine = one_unit();
    let mut all = launch(&machine).unwrap();
    machine.with_vt_d(0, |unit| {
        assert!(unit.in_region(CANARY));
        unit.status &= !(1 << 31);
    });
    assert!(!machine.dma_write(ATTACKER, CANARY, &[1]), "even a unit that stops to translate");
    machine.with_vt_d(0, |unit| unit.registers.insert(0x64, 0));
    assert!(machine.dma_write(ATTACKER, CANARY, &[1]), "but for the regions");
    machine.with_vt_d(0, |unit| {
        unit.registers.insert(0x64, 1 << 31 | 1);
        unit.status |= 1 << 31;
    });

    let mut pool = pages(&machine);
    let tables = guest_tables(&all, &mut pool);
    // Tables that lead to closed memory: refused, and nothing changes.
    let bad = all.new_tables(39, &mut pool).unwrap();
    bad.map_identity(&mut pool, PhysRange::new(GUEST, REGION).unwrap(), RW, MemoryType::WriteBack).unwrap();
    let refused = all.open_guest(&machine, &bad, &pool, &[region()], Interrupts::Granted);
    assert_eq!(refused, Err(Error::Tables(BadTables::Closed(REGION))));
    machine.with_vt_d(0, |unit| assert!(unit.in_region(CANARY)));
    assert!(!machine.dma_write(ATTACKER, GUEST, &[1]));
    // A table that is not what was written: noticed before the regions go.
    machine.attack(|machine| machine.poke64(dma_area().guest_context(), 1 | 2 << 2));
    let refused = all.open_guest(&machine, &tables, &pool, &[region()], Interrupts::Granted);
    assert!(matches!(refused, Err(Error::Tampered { .. })));
    machine.peace();
    machine.with_vt_d(0, |unit| assert!(unit.in_region(CANARY)));

    all.open_guest(&machine, &tables, &pool, &[region()], Interrupts::Granted).unwrap();
    machine.with_vt_d(0, |unit| assert!(!unit.in_region(CANARY)));
    assert!(machine.dma_write(ATTACKER, GUEST, &[1]) && !machine.dma_write(ATTACKER, CANARY, &[1]));
}

#[test]
fn the_guest_has_its_memory_and_no_more() {
    let every = [3, 4, 5].into_iter().flat_map(|levels| {
        [(1, true, false), (3, false, false), (0, true, true), (3, false, true)]
            .map(|variant| (levels, variant))
    });
    for (levels, (large, coherent, write_buffer)) in every {
        let depths = 1 << (levels - 2);
        let features = Features { depths, large, coherent, write_buffer, ..Features::full() };
        let machine = with(features);
        let (mut all, tables, _) = open(&machine, Interrupts::Granted).unwrap();
        assert_eq!((tables.levels(), all.common().coherent), (levels, coherent));

        for address in [GUEST, GUEST + 0x1234, GUEST + (4 << 20) - 8] {
            assert!(machine.dma_write(ATTACKER, address, &[1]) && machine.dma_read(ATTACKER, address));
        }
        for address in [GUEST - 1, GUEST + (4 << 20), CANARY, dma_area().deny_root(), 1 << 40] {
            assert!(!machine.dma_write(ATTACKER, address, &[1]), "{address:#x}");
        }
        all.close(&machine).unwrap();
        assert!(!machine.dma_write(ATTACKER, GUEST + 0x1234, &[1]));
        assert_closed(&machine);
    }
}

#[test]
fn tables_that_units_can_not_use_are_refused() {
    let machine = with(Features { large: 1, ..Features::full() });
    let mut all = launch(&machine).unwrap();
    let mut pool = pages(&machine);
    let mut refused = |tables: &Tables, pool: &Pages<'_>| {
        all.open_guest(&machine, tables, pool, &[region()], Interrupts::Granted).unwrap_err()
    };
    let other = Tables::new(&AMD_VI, 4, PageSize::Size2M, &mut pool).unwrap();
    assert_eq!(refused(&other, &pool), Error::Tables(BadTables::Format));
    let deep = Tables::new(&VT_D, 5, PageSize::Size2M, &mut pool).unwrap();
    assert_eq!(refused(&deep, &pool), Error::Tables(BadTables::Levels(5)));
    let large = Tables::new(&VT_D, 4, PageSize::Size1G, &mut pool).unwrap();
    let gib = PhysRange::new(2 << 30, 1 << 30).unwrap();
    large.map_identity(&mut pool, gib, RW, MemoryType::WriteBack).unwrap();
    assert_eq!(refused(&large, &pool), Error::Tables(BadTables::PageSize(2 << 30)));
    for (closed, len) in [(BASE, 4096), (dma_area().queue(0), 4096), (REGION, 1 << 21)] {
        let tables = Tables::new(&VT_D, 4, PageSize::Size2M, &mut pool).unwrap();
        // Not the address that devices use counts, but where it leads.
        let at = PhysRange::new(1 << 21, len).unwrap();
        tables.map(&mut pool, at, closed, RW, MemoryType::WriteBack).unwrap();
        assert_eq!(refused(&tables, &pool), Error::Tables(BadTables::Closed(1 << 21)));
    }
    assert_closed(&machine);
}

#[test]
fn the_fewest_levels_that_do_are_chosen() {
    for (depths, bits, levels) in [
        (0b110, 39, Some(3)),
        (0b110, 40, Some(4)),
        (0b100, 30, Some(4)),
        (0b1010, 40, Some(5)),
        (0b110, 52, None),
    ] {
        let machine = with(Features { depths, ..Features::full() });
        let all = launch(&machine).unwrap();
        let tables = all.new_tables(bits, &mut pages(&machine)).ok();
        assert_eq!(tables.map(|tables| tables.levels()), levels, "{depths:#b} {bits}");
    }
}

#[test]
fn a_change_counts_when_it_is_flushed() {
    for page_selective in [true, false] {
        let machine = with(Features { page_selective, ..Features::full() });
        let (all, tables, mut pool) = open(&machine, Interrupts::Granted).unwrap();
        let page = PhysRange::new(GUEST + 0x3000, 0x2000).unwrap();
        let others = [GUEST + 0x2000, GUEST + 0x5000];
        for address in [page.start(), page.last(), others[0], others[1]] {
            assert!(machine.dma_write(ATTACKER, address, &[1]));
        }
        tables.unmap(&mut pool, page).unwrap();
        assert!(machine.dma_write(ATTACKER, page.start(), &[1]), "cached");
        all.flush(&machine, Some(page)).unwrap();
        assert!(
            !machine.dma_write(ATTACKER, page.start(), &[1])
                && !machine.dma_write(ATTACKER, page.last(), &[1])
        );
        assert!(others.iter().all(|address| machine.dma_write(ATTACKER, *address, &[1])));
        // Pages 3 and 4 lie in no aligned block smaller than 8.
        let expected: &[_] = if page_selective { &[(GUEST, 3)] } else { &[] };
        machine.with_vt_d(0, |unit| assert_eq!(unit.page_invalidations, expected));
        // More than MAMV allows: the whole domain.
        all.flush(&machine, Some(PhysRange::new(GUEST, 4 << 20).unwrap())).unwrap();
        all.flush(&machine, None).unwrap();
        machine.with_vt_d(0, |unit| assert_eq!(unit.page_invalidations.len(), expected.len()));
    }
}

/// Units that do not look into the CPU's caches see a change when it was written back, and not before.
#[test]
fn without_coherence_lines_must_be_written_back() {
    let machine = with(Features { coherent: false, ..Features::full() });
    let (all, tables, mut pool) = open(&machine, Interrupts::Granted).unwrap();
    assert!(machine.dma_write(ATTACKER, GUEST, &[1]));
    for (writes_back, still) in [(false, true), (true, false)] {
        pool.writes_back = writes_back;
        let page = PhysRange::new(GUEST, 2 << 20).unwrap();
        tables.unmap(&mut pool, page).unwrap();
        all.flush(&machine, None).unwrap();
        assert_eq!(machine.dma_write(ATTACKER, GUEST, &[1]), still);
        if still {
            tables.map_identity(&mut pool, page, RW, MemoryType::WriteBack).unwrap();
        }
    }
}

fn protected(
    closed: &[PhysRange],
    features: Features,
    granule: u64,
    protection: Protection,
    table: &[u8],
) -> (Machine, Result<VtD<Window>, Error>) {
    let machine = with(features);
    machine.with_vt_d(0, |unit| unit.granule = granule);
    let all = deny_all(&machine, table, dma_area(), closed, protection);
    // What regions alone are good for.
    machine.with_vt_d(0, |unit| unit.status &= !(1 << 31));
    (machine, all)
}

#[test]
fn regions_are_rounded_to_what_the_unit_can_do() {
    let odd = PhysRange::from_last(REGION - 0x3000, REGION + REGION_SIZE + 0x4fff).unwrap();
    for granule in [1 << 20, 2 << 20, 16 << 20] {
        let (machine, all) = protected(&[odd], Features::full(), granule, Protection::Set, &dmar());
        all.unwrap();
        let (start, end) = (REGION - granule, REGION + REGION_SIZE + granule);
        for (address, open) in
            [(start - 1, true), (start, false), (end - 1, false), (end, true), (5 << 30, true)]
        {
            assert_eq!(machine.dma_write(ATTACKER, address, &[1]), open, "{granule:#x} {address:#x}");
        }
    }
}

#[test]
fn regions_that_can_not_be_had_are_refused() {
    let full = Features::full();
    let lacks = |need| Err(Error::Lacks { base: BASE, need });
    let try_on = |closed: &[PhysRange], features, protection| {
        protected(closed, features, 2 << 20, protection, &dmar()).1.map(|all| all.unguarded())
    };
    let high = PhysRange::new(6 << 30, 1 << 30).unwrap();
    let no_low = Features { low_region: false, ..full };
    let no_high = Features { high_region: false, ..full };
    let none = Features { low_region: false, high_region: false, ..full };
    assert_eq!(try_on(&[region()], no_low, Protection::Set), lacks(Need::LowRegion));
    assert_eq!(try_on(&[region(), high], no_high, Protection::Set), lacks(Need::HighRegion));
    assert_eq!(try_on(&[region()], no_high, Protection::Set), Ok(0));
    assert_eq!(try_on(&[region()], none, Protection::IfAny), Ok(1));
    assert_eq!(try_on(&[region()], full, Protection::IfAny), Ok(0));
    let uncovered = Error::Uncovered { base: BASE, range: region() };
    assert_eq!(try_on(&[region()], full, Protection::InForce), Err(uncovered));
    assert_eq!(try_on(&[region()], none, Protection::InForce), Err(uncovered));

    // A reserved region that rounding would cover: firmware's device would be cut off.
    let near = Table::new(46).unit(1, 0, BASE, &[]).region(
        0,
        REGION - 0x1000,
        REGION - 1,
        &scope(1, 0, 0, &[(2, 0)]),
    );
    let near = near.finish();
    let below = PhysRange::new(REGION - 0x1000, 0x1000).unwrap();
    let odd = PhysRange::new(REGION + 0x1000, REGION_SIZE - 0x1000).unwrap();
    let far = protected(&[odd], full, 1 << 20, Protection::Set, &near).1;
    assert!(far.is_ok());
    let overlap = protected(&[odd], full, 16 << 21, Protection::Set, &near).1.map(|_| ());
    assert_eq!(overlap, Ok(()), "the granule reaches up only");
    let odd = PhysRange::new(REGION - 0x2000, 0x1000).unwrap();
    let overlap = protected(&[region(), odd], full, 1 << 20, Protection::Set, &near).1.map(|_| ());
    assert_eq!(overlap, Err(Error::Overlap { base: BASE, range: below }));
}

#[test]
fn what_sinit_protects_is_left_alone() {
    for (base, limit, covers) in [
        (REGION, REGION + REGION_SIZE - (2 << 20), false),
        // SINIT's granule is not known: what the limit says for sure is 1 MiB.
        (REGION, REGION + REGION_SIZE - (1 << 20), true),
        (0, 0xffe0_0000, false),
        (0, 0x7fe0_0000, true),
        (REGION + (2 << 20), 0x7fe0_0000, false),
    ] {
        let machine = one_unit();
        machine.with_vt_d(0, |unit| {
            unit.granule = 1 << 20;
            unit.registers.extend([(0x68, base), (0x6c, limit), (0x64, 1 << 31 | 1)]);
        });
        let top = PhysRange::from_last(0xfff0_0000, 0xffff_ffff).unwrap();
        let closed: &[_] = if limit > 0x8000_0000 { &[region(), top] } else { &[region()] };
        // A change of the regions would panic the model.
        let all = deny_all(&machine, &dmar(), dma_area(), closed, Protection::InForce);
        match covers {
            true => assert_eq!(all.unwrap().unguarded(), 0),
            false => assert!(matches!(all, Err(Error::Uncovered { .. }))),
        }
    }
}

#[test]
fn hulls_are_cut_at_4_gib() {
    let range = |start, last| PhysRange::from_last(start, last);
    let cut = |ranges: &[(u64, u64)]| {
        hulls(&ranges.iter().map(|(start, last)| range(*start, *last).unwrap()).collect::<Vec<_>>())
    };
    assert_eq!(cut(&[]), [None, None]);
    assert_eq!(cut(&[(5, 9), (2, 3)]), [range(2, 9), None]);
    assert_eq!(cut(&[(1 << 32, 1 << 33)]), [None, range(1 << 32, 1 << 33)]);
    assert_eq!(cut(&[(9, u64::MAX)]), [range(9, 0xffff_ffff), range(1 << 32, u64::MAX)]);
}

#[test]
fn devices_send_what_was_granted_and_no_more() {
    let machine = one_unit();
    let (mut all, ..) = open(&machine, Interrupts::Granted).unwrap();
    let send = |device, address, data: u32| machine.dma_write(device, address, &data.to_le_bytes());
    for index in [0, 7, 0x8001, 0xffff] {
        let address = remappable(index.into());
        assert!(!send(ATTACKER, address, 0));
        all.grant(&machine, index, Some(&INTERRUPT)).unwrap();
        // What the data say does not count, but the entry.
        assert!(send(ATTACKER, address, MSI[2]));
        assert_eq!(machine.interrupts().last(), Some(&0x41));
        assert!(!send(ATTACKER + 1, address, 0), "another device's");
        assert!(!send(ATTACKER, remappable(u64::from(index) ^ 1), 0));
        let other = Interrupt { vector: 0x42, lowest_priority: true, ..INTERRUPT };
        all.grant(&machine, index, Some(&other)).unwrap();
        assert!(send(ATTACKER, address, 0));
        assert_eq!(machine.interrupts().last(), Some(&0x142));
        all.verify(&machine).unwrap();
        all.grant(&machine, index, None).unwrap();
        assert!(!send(ATTACKER, address, 0));
    }
    let sent = machine.interrupts().len();
    for data in MSI {
        assert!(!send(ATTACKER, COMPATIBLE_MSI, data));
    }
    for vector in [0, 15, 255] {
        let bad = Interrupt { vector, ..INTERRUPT };
        assert_eq!(all.grant(&machine, 1, Some(&bad)), Err(Error::Vector { vector }));
    }
    assert_eq!(machine.interrupts().len(), sent);

    // An entry with delivery mode NMI, or for any source, is none of ours.
    for entry in [[0x0000_0300_0041_0081, 1 << 18], [0x0000_0300_0041_0001, 0x0310]] {
        let at = dma_area().interrupt_table() + 9 * 16;
        machine.poke64(at, entry[0]);
        machine.poke64(at + 8, entry[1]);
        assert!(send(ATTACKER, remappable(9), 0) || entry[1] != 0x0310);
        assert!(matches!(all.verify(&machine), Err(Error::Tampered { .. })));
        machine.poke64(at, 0);
        machine.poke64(at + 8, 0);
        all.grant(&machine, 9, Some(&INTERRUPT)).unwrap();
        all.grant(&machine, 9, None).unwrap();
    }
    all.close(&machine).unwrap();
    assert!(!send(ATTACKER, COMPATIBLE_MSI, MSI[0]));
}

#[test]
fn an_interrupt_whose_target_changes_is_never_lost() {
    let machine = one_unit();
    let (all, ..) = open(&machine, Interrupts::Granted).unwrap();
    all.grant(&machine, 7, Some(&INTERRUPT)).unwrap();
    let lost = Rc::new(Cell::new(0));
    let counted = lost.clone();
    machine.attack(move |machine| {
        if !machine.dma_write(ATTACKER, remappable(7), &[0; 4]) {
            counted.set(counted.get() + 1);
        }
    });
    all.grant(&machine, 7, Some(&Interrupt { destination: 5, vector: 0x42, ..INTERRUPT })).unwrap();
    machine.peace();
    assert_eq!((lost.get(), machine.interrupts().last()), (0, Some(&0x42)));
}

/// The exposure, written down: compatibility format lets every kind of interrupt pass (ADR 0012).
#[test]
fn compatibility_format_is_open_to_all_interrupts() {
    let machine = one_unit();
    let (mut all, ..) = open(&machine, Interrupts::Compatible).unwrap();
    for data in MSI {
        assert!(machine.dma_write(ATTACKER, COMPATIBLE_MSI, &data.to_le_bytes()));
        assert!(!machine.dma_write(ATTACKER, remappable(0), &data.to_le_bytes()));
    }
    assert_eq!(machine.interrupts(), MSI.map(u64::from));
    all.close(&machine).unwrap();
    assert!(!machine.dma_write(ATTACKER, COMPATIBLE_MSI, &MSI[0].to_le_bytes()));

    let machine = with(Features { interrupts: false, ..Features::full() });
    let lacks = Error::Lacks { base: BASE, need: Need::Interrupts };
    for interrupts in [Interrupts::Granted, Interrupts::Compatible] {
        assert_eq!(open(&machine, interrupts).err(), Some(lacks));
    }
    open(&machine, Interrupts::Unchecked).unwrap();
    assert!(machine.dma_write(ATTACKER, COMPATIBLE_MSI, &MSI[1].to_le_bytes()));
}

#[test]
fn blocked_requests_are_recorded_and_drained() {
    let machine = one_unit();
    let (all, ..) = open(&machine, Interrupts::Granted).unwrap();
    machine.dma_write(ATTACKER, CANARY, &[1]);
    machine.dma_read(ATTACKER, GUEST - 1);
    machine.dma_write(ATTACKER, 1 << 60, &[1]);
    machine.dma_write(ATTACKER, remappable(5), &[1]);
    let mut seen = vec![];
    assert_eq!(
        all.drain(|fault| seen.push(fault)),
        Drained { events: 2 + 2, overflowed: false, more: false }
    );
    let fault = |address, access, reason| Fault { source: ATTACKER.into(), address, access, reason };
    assert_eq!(
        seen,
        [
            fault(CANARY, Access::Write, Reason::Denied),
            fault((GUEST - 1) & !0xfff, Access::Read, Reason::Denied),
            fault(1 << 60, Access::Write, Reason::Denied),
            fault(5, Access::Write, Reason::Interrupt),
        ]
    );
    assert_eq!(all.drain(|_| {}), Drained::default());
    // Four records: the fifth is lost, and that is told once.
    for _ in 0..5 {
        machine.dma_write(ATTACKER, COMPATIBLE_MSI, &[1]);
    }
    assert_eq!(all.drain(|_| {}), Drained { events: 4, overflowed: true, more: false });
    assert_eq!(all.drain(|_| {}), Drained::default());
    machine.dma_write(ATTACKER, CANARY, &[1]);
    assert_eq!(all.drain(|_| {}).events, 1);

    // A device whose faults come as fast as they are taken out costs as many as there are records.
    let many = with(Features { records: 200, ..Features::full() });
    let (all, ..) = open(&many, Interrupts::Granted).unwrap();
    for _ in 0..200 {
        many.dma_write(ATTACKER, CANARY, &[1]);
    }
    many.attack(|machine| {
        machine.dma_write(ATTACKER, CANARY, &[1]);
    });
    assert_eq!(all.drain(|_| {}), Drained { events: 64, overflowed: false, more: true });
    all.verify_registers().unwrap();
}

#[test]
fn faults_say_what_the_specification_says() {
    let decode = |code: u64, high: u64| {
        fault::decode(2, [0x7fff_1234_5678_9abc, 1 << 63 | high | code << 32 | 0x0310])
    };
    for code in [1, 2, 4, 5, 6, 0xd] {
        assert_eq!(decode(code, 0).reason, Reason::Denied);
    }
    for code in [3, 7, 8, 9, 0xa, 0xb, 0xc, 0x23, 0x24, 0x27] {
        assert_eq!(decode(code, 0).reason, Reason::Broken(code as u8));
    }
    for code in [0x20, 0x21, 0x22, 0x25, 0x26] {
        let fault = decode(code, 0);
        assert_eq!((fault.reason, fault.address), (Reason::Interrupt, 0x7fff));
    }
    let read = decode(6, 1 << 62);
    assert_eq!((read.access, read.address, read.source), (Access::Read, 0x7fff_1234_5678_9000, 0x2_0310));
}

#[test]
fn a_stuck_unit_is_a_timeout_not_a_hang() {
    for (defect, register) in [
        (Defect::QueueStuck, 0),
        (Defect::StatusStuck, reg::GSTS),
        (Defect::RegionsStuck, reg::PMEN),
        (Defect::Ignores(reg::GCMD), reg::GSTS),
    ] {
        let machine = one_unit();
        machine.with_vt_d(0, |unit| unit.defect = Some(defect));
        let error = launch(&machine).err().unwrap();
        assert!(matches!(error, Error::Timeout { base: BASE, register: r, .. } if r == register), "{error}");
    }
    let machine = one_unit();
    machine.with_vt_d(0, |unit| unit.defect = Some(Defect::QueueRefuses));
    assert_eq!(launch(&machine).err(), Some(Error::Invalidation { base: BASE, status: 1 << 4 }));
    // The gap's own queue that never ends only costs time.
    let machine = one_unit();
    gap_left_it_on(&machine, ATTACKER);
    machine.with_vt_d(0, |unit| unit.registers.insert(0x88, 0x40));
    launch(&machine).unwrap();
    assert_closed(&machine);
}

#[test]
fn a_register_that_does_not_take_is_refused() {
    for register in [reg::RTADDR, reg::IQA, reg::IRTA, reg::PLMBASE, reg::PLMLIMIT, reg::FECTL, reg::IECTL] {
        let machine = one_unit();
        gap_left_it_on(&machine, ATTACKER);
        machine.with_vt_d(0, |unit| unit.defect = Some(Defect::Ignores(register)));
        let error = launch(&machine).err().unwrap();
        assert!(
            matches!(error, Error::Register { register: r, .. } if r == register),
            "{register:#x}: {error}"
        );
    }
}

#[test]
fn every_unit_is_handled_or_the_launch_refused() {
    let deny = |machine: &Machine, table: Table| {
        deny_all(machine, &table.finish(), dma_area(), &[region()], Protection::Set).map(|all| all.count())
    };
    let listed = || Table::new(46).unit(0, 0, BASE, &[]);
    let machine = one_unit();
    assert_eq!(deny(&machine, Table::new(46)), Err(Error::None));
    let unmapped = Err(Error::Base { base: 0xfed9_1000 });
    assert_eq!(deny(&machine, listed().unit(1, 0, 0xfed9_1000, &[])), unmapped);
    let window = deny_all(
        &machine,
        &dmar(),
        dma_area(),
        &[PhysRange::new(BASE + 0x1fff, 1).unwrap()],
        Protection::Set,
    );
    assert_eq!(window.err(), Some(Error::Base { base: BASE }), "the records lie in a second page");
    machine.add_vt_d(Model::new(BASE + 0x1000, 0..=0, Features::full()));
    let within = Err(Error::Base { base: BASE + 0x1000 });
    assert_eq!(deny(&machine, listed().unit(1, 0, BASE + 0x1000, &[])), within);
    assert!(matches!(deny(&machine, Table::new(46).unit(0, 0, BASE + 1, &[])), Err(Error::Dmar(_))));

    // Two segments: ports reach the first only, registers are memory.
    machine.add_vt_d(Model::new(0xfbff_c000, 0..=0, Features::full()));
    assert_eq!(deny(&machine, listed().unit(1, 1, 0xfbff_c000, &[])), Ok(2));

    let lacking = with(Features { queue: false, ..Features::full() });
    assert_eq!(deny(&lacking, listed()), Err(Error::Lacks { base: BASE, need: Need::Queue }));
    let lacking = with(Features { depths: 1, ..Features::full() });
    assert_eq!(deny(&lacking, listed()), Err(Error::Lacks { base: BASE, need: Need::Levels }));

    let crowd = Machine::new();
    let mut table = Table::new(46);
    for index in 0..=MAX_UNITS as u64 {
        crowd.add_vt_d(Model::new(BASE + 0x4000 * index, 0..=0, Features::full()));
        table = table.unit(0, 0, BASE + 0x4000 * index, &[]);
    }
    assert_eq!(deny(&crowd, table), Err(Error::TooMany));
}

#[test]
fn the_mle_notices_what_changed_since() {
    let machine = one_unit();
    launch(&machine).unwrap();
    let take_over = |count| {
        VtD::take_over(&machine, &dmar(), dma_area(), &[region()], Protection::Set, count).map(|_| ())
    };
    assert_eq!(take_over(1), Ok(()));
    assert_eq!(take_over(2), Err(Error::Count { found: 1, wanted: 2 }));
    for entry in [dma_area().deny_root() + 0xff0, dma_area().interrupt_table() + 0xf_fff0] {
        machine.poke64(entry, 1);
        assert!(matches!(take_over(1), Err(Error::Tampered { .. })));
        machine.poke64(entry, 0);
    }
    for register in [reg::RTADDR, reg::IQA, reg::IRTA, reg::FECTL] {
        let old = machine.with_vt_d(0, |unit| unit.registers.insert(register, 0x1000)).unwrap();
        assert!(matches!(take_over(1), Err(Error::Register { register: r, .. }) if r == register));
        machine.with_vt_d(0, |unit| unit.registers.insert(register, old));
    }
    for bit in [31, 28, 26, 25, 23] {
        machine.with_vt_d(0, |unit| unit.status ^= 1 << bit);
        assert!(matches!(take_over(1), Err(Error::Register { register: reg::GSTS, .. })), "{bit}");
        machine.with_vt_d(0, |unit| unit.status ^= 1 << bit);
    }
    assert_eq!(take_over(1), Ok(()));
    machine.with_vt_d(0, |unit| unit.registers.insert(0x64, 0));
    assert!(matches!(take_over(1), Err(Error::Uncovered { .. })));
}

/// A random set of features that a launch must cope with.
fn features() -> impl Strategy<Value = Features> {
    let bits = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (1u64..8, prop::sample::select(vec![0u64, 1, 3]), bits, 1u64..9).prop_map(
        |(depths, large, (write_buffer, coherent, interrupts, page_selective, _), records)| Features {
            depths: depths << 1,
            large,
            write_buffer,
            coherent,
            interrupts,
            page_selective,
            records,
            ..Features::full()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the units can do, whatever the gap left, wherever devices write after each access: nothing closed is
    /// reached from the CPU's first write there on, and in the end all is shut.
    #[test]
    fn nothing_gets_through_from_the_first_write_on(
        features in prop::collection::vec(features(), 3),
        on in any::<bool>(),
        blocks in any::<bool>(),
        granule in prop::sample::select(vec![1u64 << 20, 2 << 20, 16 << 20]),
        targets in prop::collection::vec((any::<u16>(), 0..REGION_SIZE / 8), 1..6),
    ) {
        let machine = Machine::new();
        let mut table = Table::new(46);
        for (index, features) in (0u64..).zip(features) {
            let serves = match index { 0 => 0..=0x3fff, 1 => 0x4000..=0x7fff, _ => 0x8000..=u16::MAX };
            machine.add_vt_d(Model::new(BASE + 0x4000 * index, serves, features));
            machine.with_vt_d(index as usize, |unit| {
                unit.granule = granule;
                unit.regions_block_translated = blocks;
            });
            table = table.unit(0, 0, BASE + 0x4000 * index, &[]);
        }
        if on {
            gap_left_it_on(&machine, ATTACKER);
        }
        machine.watch(region().start()..=region().last());
        let hits = Rc::new(Cell::new(0));
        let counted = hits.clone();
        machine.attack(move |machine| {
            for (device, word) in &targets {
                for device in [*device, ATTACKER] {
                    if machine.dma_write(device, REGION + word * 8, &[0xff; 8]) && machine.guarding() {
                        counted.set(counted.get() + 1);
                    }
                }
            }
        });
        let launched = deny_all(&machine, &table.finish(), dma_area(), &[region()], Protection::Set);
        prop_assert!(launched.is_ok(), "{}", launched.err().unwrap());
        prop_assert_eq!(hits.get(), 0);
        machine.peace();
        for device in [0, ATTACKER, 0x4000, 0xffff] {
            prop_assert!(!machine.dma_write(device, CANARY, &[1]) && !machine.dma_write(device, 0, &[1]));
        }
    }

    /// Regions alone protect every byte of what is closed, wherever it lies; without them nothing does.
    #[test]
    fn regions_cover_every_placement(
        ranges in prop::collection::vec((0u64..1 << 23, 1u64..1 << 12), 1..5),
        granule in prop::sample::select(vec![1u64 << 20, 2 << 20, 16 << 20]),
    ) {
        // Clear of the units' registers.
        let closed: Vec<PhysRange> = ranges
            .iter()
            .map(|(page, pages)| PhysRange::new(page << 12, pages << 12).unwrap())
            .filter(|range| !range.overlaps(&PhysRange::new(0xfe00_0000, 0x200_0000).unwrap()))
            .chain([region()])
            .collect();
        let (machine, all) = protected(&closed, Features::full(), granule, Protection::Set, &dmar());
        prop_assert!(all.is_ok(), "{}", all.err().unwrap());
        for range in &closed {
            for address in [range.start(), range.start() + range.len() / 2, range.last()] {
                prop_assert!(machine.with_vt_d(0, |unit| unit.in_region(address)));
                prop_assert!(!machine.dma_read(ATTACKER, address));
            }
        }
        machine.with_vt_d(0, |unit| unit.registers.insert(0x64, 0));
        prop_assert!(closed.iter().all(|range| machine.dma_read(ATTACKER, range.start())));
    }

    /// What devices reach through the unit is what the description of memory gives them, whatever the layout.
    #[test]
    fn devices_reach_what_the_space_gives_them(
        claims in prop::collection::vec((0u64..0x10_0000, 1u64..0x4000, any::<bool>()), 0..12),
        large in prop::sample::select(vec![0u64, 1, 3]),
        depths in 1u64..8,
    ) {
        let machine = with(Features { large, depths: depths << 1, ..Features::full() });
        let mut all = launch(&machine).unwrap();
        let mut space = AddressSpace::new(39, region(), None).unwrap();
        for window in all.windows() {
            space.assign(window, Kind::Closed(hv::space::Hole::IommuRegisters)).unwrap();
        }
        let mut edges = vec![0, REGION, REGION + REGION_SIZE, BASE];
        for (page, pages, ram) in claims {
            let kind = if ram { Kind::Ram } else { Kind::FirmwareData };
            let range = PhysRange::new(page << 12, pages << 12).unwrap();
            if space.assign(range, kind).is_ok() {
                edges.extend([range.start(), range.last() + 1]);
            }
        }
        let mut pool = pages(&machine);
        let tables = all.new_tables(39, &mut pool).unwrap();
        space.map_view(View::Device, &tables, &mut pool).unwrap();
        all.open_guest(&machine, &tables, &pool, &[region()], Interrupts::Granted).unwrap();
        for edge in edges {
            for address in [edge.saturating_sub(1), edge] {
                if (0xfee0_0000..0xfef0_0000).contains(&address) {
                    continue;
                }
                let page = PhysRange::new(address, 1).unwrap();
                prop_assert_eq!(machine.dma_read(ATTACKER, address), space.permits(View::Device, page, RW), "{:#x}", address);
            }
        }
    }

    /// After a flush of a range no page of it is cached, whatever the range.
    #[test]
    fn a_flush_reaches_all_of_its_range(first in 0u64..1024, pages in 1u64..1024) {
        let machine = one_unit();
        let (all, ..) = open(&machine, Interrupts::Granted).unwrap();
        let pages = pages.min(1024 - first);
        let range = PhysRange::new(GUEST + first * PAGE_SIZE, pages * PAGE_SIZE).unwrap();
        for page in 0..1024 {
            machine.dma_read(ATTACKER, GUEST + page * PAGE_SIZE);
        }
        all.flush(&machine, Some(range)).unwrap();
        machine.with_vt_d(0, |unit| {
            assert!(unit.cached_pages.keys().all(|(_, page)| !range.contains_addr(page * PAGE_SIZE)));
        });
    }
}
