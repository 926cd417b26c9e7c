use hv::addr::PhysRange;
use hv::io::PhysMem;
use hv::radix::{AMD_VI, PageSize, Rights, Tables};
use hv::space::{AddressSpace, Hole, Kind, View};
use proptest::prelude::*;

use super::defs::{Dte, dte, reg};
use super::{AmdVi, DmaArea, Error, Interrupts, Root, area, deny_all, event};
use crate::Platform;
use crate::fault::{Access, Drained, Fault, Reason};
use crate::ivrs::Ivrs;
use crate::model::{Defect, Machine, Pages, Table, Window};

const REGION: u64 = 0x4000_0000;
const REGION_SIZE: u64 = 16 << 20;
/// Memory that only the MLE may write.
const CANARY: u64 = REGION + 0x1000;
/// Memory of the gap: its device table.
const GAP_TABLE: u64 = 0x1000_0000;
const UNIT: u16 = 0x0002;
const BASE: u64 = 0xfeb8_0000;
const ATTACKER: u16 = 0x0310;
const OPEN: Dte = [dte::VALID | dte::TRANSLATION_VALID | dte::READ | dte::WRITE, 0, 0, 0];
/// MSI data: a fixed interrupt, an SMI, an NMI, an INIT, an ExtINT.
const MSI: [u32; 5] = [0x0030, 0x0200, 0x0400, 0x0500, 0x0700];

fn region() -> PhysRange {
    PhysRange::new(REGION, REGION_SIZE).unwrap()
}

fn dma_area() -> DmaArea {
    DmaArea::at_top_of(&region()).unwrap()
}

fn one_unit() -> Machine {
    let machine = Machine::new();
    machine.add_unit(UNIT, BASE, 0..=u16::MAX, true);
    machine
}

fn ivrs() -> Vec<u8> {
    Table::new().unit(0x10, UNIT, BASE, 0, &[1, 0, 0, 0]).finish()
}

fn launch(machine: &Machine) -> Result<AmdVi<Window>, Error> {
    deny_all(machine, &ivrs(), dma_area(), &[region()])
}

/// What [`deny_all`] does before its first step.
fn found(machine: &Machine) -> (AmdVi<Window>, u64) {
    let nowhere = area::nowhere(machine.random());
    let table = ivrs();
    let ivrs = Ivrs::new(&table).unwrap();
    (AmdVi::discover(machine, &ivrs, dma_area(), &[region()], Some(nowhere)).unwrap(), nowhere)
}

/// The gap turned IOMMU `index` on with a table of zeros, which lets all pass, and had `device` use it.
fn gap_left_it_on(machine: &Machine, index: usize, device: u16) {
    machine.with_unit(index, |unit| {
        unit.registers.insert(reg::DEVICE_TABLE, GAP_TABLE | 0x1ff);
        unit.registers.insert(reg::CONTROL, 0x1005);
        unit.registers.insert(reg::EXCLUSION_BASE, 3);
    });
    assert!(machine.dma_write(device, CANARY, &[0]));
    machine.with_unit(index, |unit| assert!(unit.cached_entries.contains_key(&device)));
}

/// Writes a table entry as fast as no real device could: all between two accesses of the CPU.
fn dma_entry(machine: &Machine, device: u16, entry: Dte) {
    for (n, quad) in (0..).zip(entry) {
        machine.dma_write(device, dma_area().entry(device.into()) + 8 * n, &quad.to_le_bytes());
    }
}

/// Opens the attacker's entry as soon as the table is in force, has the IOMMU cache it, and covers its tracks.
fn open_own_entry(machine: &Machine) {
    if machine.with_unit(0, |unit| unit.register(reg::DEVICE_TABLE)) == dma_area().table_register() {
        dma_entry(machine, ATTACKER, OPEN);
        machine.dma_write(ATTACKER, CANARY, b"gotcha!!");
        dma_entry(machine, ATTACKER, dte::DENY);
    }
}

fn assert_closed(machine: &Machine) {
    machine.peace();
    let mut block = [0; 32];
    for device in 0..=u16::MAX {
        machine.read(dma_area().entry(device.into()), &mut block);
        assert_eq!(block, super::dte_bytes(dte::DENY));
    }
    for device in [0, 1, UNIT, 0xa0, ATTACKER, 0x1fff, 0xffff] {
        for address in [0, CANARY, dma_area().entry(device.into()), 0x1000, BASE] {
            assert!(!machine.dma_write(device, address, &[1]), "{device:#x} writes {address:#x}");
            assert!(!machine.dma_read(device, address));
        }
        for data in MSI {
            assert!(!machine.dma_write(device, 0xfee0_0000, &data.to_le_bytes()));
        }
    }
    assert_ne!(machine.peek64(CANARY), u64::from_le_bytes(*b"gotcha!!"));
}

#[test]
fn a_machine_left_open_is_closed() {
    let machine = one_unit();
    assert!(machine.dma_write(ATTACKER, CANARY, &[1]));
    assert_eq!(launch(&machine).unwrap().count(), 1);
    assert_closed(&machine);
}

#[test]
fn the_attack_fails_against_all_steps() {
    let machine = one_unit();
    gap_left_it_on(&machine, 0, ATTACKER);
    machine.attack(open_own_entry);
    launch(&machine).unwrap();
    assert_closed(&machine);
}

/// The same attack, against a launch that leaves something out: it succeeds, and no check sees it.
fn attack_on(steps: impl Fn(&AmdVi<Window>, &Machine, u64) -> Result<(), Error>) -> bool {
    let machine = one_unit();
    gap_left_it_on(&machine, 0, ATTACKER);
    let (all, nowhere) = found(&machine);
    machine.attack(open_own_entry);
    steps(&all, &machine, nowhere).unwrap();
    machine.dma_write(ATTACKER, CANARY, b"gotcha!!");
    machine.peek64(CANARY) == u64::from_le_bytes(*b"gotcha!!")
}

#[test]
fn each_step_is_needed() {
    assert!(!attack_on(|all, machine, nowhere| {
        all.point_nowhere(machine, nowhere)?;
        all.forget(machine, nowhere)?;
        all.write_deny_table(machine)?;
        all.switch_to_table(machine)?;
        all.verify(machine)
    }));
    let without_nowhere = attack_on(|all, machine, _| {
        all.write_deny_table(machine)?;
        machine.with_unit(0, |unit| unit.registers.insert(reg::EXCLUSION_BASE, 0));
        all.switch_to_table(machine)?;
        all.verify(machine)
    });
    assert!(without_nowhere);
    let without_forget = attack_on(|all, machine, nowhere| {
        all.point_nowhere(machine, nowhere)?;
        all.write_deny_table(machine)?;
        all.switch_to_table(machine)?;
        all.verify(machine)
    });
    assert!(without_forget);
    let without_table = attack_on(|all, machine, nowhere| {
        all.point_nowhere(machine, nowhere)?;
        all.forget(machine, nowhere)?;
        all.switch_to_table(machine)
    });
    assert!(without_table);
}

#[test]
fn an_exclusion_range_is_a_hole_when_left() {
    let machine = one_unit();
    gap_left_it_on(&machine, 0, ATTACKER);
    let all = launch(&machine).unwrap();
    assert!(!machine.dma_write(ATTACKER, CANARY, &[1]));
    machine.with_unit(0, |unit| unit.registers.insert(reg::EXCLUSION_BASE, 3));
    assert!(machine.dma_write(ATTACKER, CANARY, &[1]));
    assert!(matches!(all.verify_registers(), Err(Error::Register { register: reg::EXCLUSION_BASE, .. })));
}

/// The limit of step 2, written down: a device with cached rights that knew every command page in time would keep
/// them. That it can't know is what the random pages are for.
#[test]
fn unpredictable_pages_are_what_protects_the_commands() {
    const JUNK: u64 = 6 << 60;
    fn spoil(machine: &Machine, page: u64) {
        let (ring, head, tail) = machine.with_unit(0, |unit| {
            (
                unit.register(reg::COMMAND_BASE),
                unit.register(reg::COMMAND_HEAD),
                unit.register(reg::COMMAND_TAIL),
            )
        });
        let at = if page == 0 { ring & 0x000f_ffff_ffff_f000 } else { page };
        // Not yet taken: spoil. Taken: mend, so that nobody sees.
        let (from, to) = if head == tail && head == 0 { (8 << 60, JUNK) } else { (JUNK, 8 << 60) };
        if machine.peek64(at) == from {
            machine.dma_write(ATTACKER, at, &u64::to_le_bytes(to));
        }
    }
    for (page, wins) in [(0, true), (dma_area().any_page(17), false)] {
        let machine = one_unit();
        gap_left_it_on(&machine, 0, ATTACKER);
        machine.attack(move |machine| spoil(machine, page));
        launch(&machine).unwrap();
        assert_eq!(machine.dma_write(ATTACKER, CANARY, &[1]), wins);
    }
}

#[test]
fn a_unit_that_can_not_invalidate_all_forgets_every_device() {
    let machine = Machine::new();
    machine.add_unit(UNIT, BASE, 0..=u16::MAX, false);
    for device in [0, 253, 254, ATTACKER, u16::MAX] {
        gap_left_it_on(&machine, 0, device);
        machine.with_unit(0, |unit| unit.cached_pages.insert((device, 0), 0));
    }
    let (all, nowhere) = found(&machine);
    all.point_nowhere(&machine, nowhere).unwrap();
    assert!(machine.dma_write(u16::MAX, CANARY, &[1]));
    all.flush(&machine).unwrap();
    machine.with_unit(0, |unit| assert!(unit.cached_entries.is_empty() && unit.cached_pages.is_empty()));
    assert!(!machine.dma_write(u16::MAX, CANARY, &[1]));
}

#[test]
fn changed_commands_are_noticed() {
    let machine = one_unit();
    gap_left_it_on(&machine, 0, ATTACKER);
    machine.attack(|machine| {
        let ring = machine.with_unit(0, |unit| unit.register(reg::COMMAND_BASE)) & 0x000f_ffff_ffff_f000;
        machine.dma_write(ATTACKER, ring, &u64::to_le_bytes(6 << 60));
    });
    assert!(matches!(launch(&machine), Err(Error::Tampered { .. })));
}

#[test]
fn a_stuck_unit_is_a_timeout_not_a_hang() {
    for (defect, register) in [(Defect::CommandsStuck, 0), (Defect::StatusStuck, reg::STATUS)] {
        let machine = one_unit();
        machine.with_unit(0, |unit| unit.defect = Some(defect));
        let error = launch(&machine).err().unwrap();
        assert!(
            matches!(error, Error::Timeout { device: UNIT, register: r, .. } if r == register),
            "{error}"
        );
    }
}

#[test]
fn a_register_that_does_not_take_is_refused() {
    for register in [reg::DEVICE_TABLE, reg::CONTROL, reg::EXCLUSION_BASE, reg::COMMAND_BASE, reg::EVENT_BASE]
    {
        let machine = one_unit();
        gap_left_it_on(&machine, 0, ATTACKER);
        machine.with_unit(0, |unit| unit.defect = Some(Defect::Ignores(register)));
        let error = launch(&machine).err().unwrap();
        assert!(matches!(error, Error::Register { register: r, .. } if r == register), "{error}");
    }
}

#[test]
fn ivrs_and_pci_must_agree() {
    let deny = |machine: &Machine, table: Table, clear: &[PhysRange]| {
        deny_all(machine, &table.finish(), dma_area(), clear).err().unwrap()
    };
    let listed = || Table::new().unit(0x10, UNIT, BASE, 0, &[]);

    let machine = one_unit();
    assert_eq!(deny(&machine, Table::new(), &[]), Error::Unlisted { device: UNIT });
    let more = listed().unit(0x10, 3, BASE, 0, &[]);
    assert_eq!(deny(&machine, more, &[]), Error::Absent { device: 3 });
    let elsewhere = Table::new().unit(0x10, UNIT, BASE, 1, &[]);
    assert_eq!(deny(&machine, elsewhere, &[]), Error::Segment { device: UNIT, segment: 1 });
    let moved = Table::new().unit(0x10, UNIT, 0x1000_0000, 0, &[]);
    let differs = Error::BaseDiffers { device: UNIT, table: 0x1000_0000, capability: BASE };
    assert_eq!(deny(&machine, moved, &[]), differs);
    let base = Error::Base { device: UNIT, base: BASE };
    assert_eq!(deny(&machine, listed(), &[PhysRange::new(BASE + 0x3fff, 1).unwrap()]), base);

    machine.set_config(0x10, 0, 0x1111_1022);
    machine.set_config(0x10, 8, 0x0806_0000);
    assert_eq!(deny(&machine, listed(), &[]), Error::NoCapability { device: 0x10 });

    let machine = Machine::new();
    assert_eq!(deny(&machine, Table::new(), &[]), Error::None);
    let one = one_unit();
    one.add_unit(0x4002, BASE, 0x4000..=0x7fff, true);
    let twice = listed().unit(0x10, 0x4002, BASE, 0, &[]);
    assert_eq!(deny(&one, twice, &[]), Error::Base { device: 0x4002, base: BASE });
}

#[test]
fn a_base_that_was_never_enabled_is_set_and_locked() {
    let machine = one_unit();
    machine.set_config(UNIT, 0x44, 0);
    machine.set_config(UNIT, 0x48, 0x1234);
    launch(&machine).unwrap();
    let function = crate::pci::Function::new(&machine, UNIT);
    assert_eq!((function.read(0x44), function.read(0x48)), (BASE as u32 | 1, 0));
}

#[test]
fn no_bar_may_answer_for_the_table_that_is_nowhere() {
    let machine = one_unit();
    machine.set_config(0x18, 0, 0x1111_1234);
    machine.set_config(0x18, 0x14, 0b1100);
    machine.set_config(0x18, 0x18, 0x000f_fffe);
    assert_eq!(launch(&machine).err(), Some(Error::Claimed { device: 0x18, register: 0x14 }));
    machine.set_config(0x18, 0x18, 0x000f_ff00 ^ 0x0001_0000);
    assert!(launch(&machine).is_ok());
}

#[test]
fn the_parts_of_a_comparison_are_the_whole_table() {
    let machine = one_unit();
    launch(&machine).unwrap();
    let all = AmdVi::take_over(&machine, &ivrs(), dma_area(), &[region()], 1).unwrap();
    let by_parts = || {
        let mut next = Some(0);
        while let Some(from) = next {
            next = all.verify_part(from, &machine)?;
        }
        Ok(())
    };
    assert_eq!(by_parts(), Ok(()));
    for device in [0, super::PART_DEVICES - 1, super::PART_DEVICES, 0xffff] {
        let entry = dma_area().entry(device);
        let was = machine.peek64(entry);
        machine.poke64(entry, !was);
        assert!(matches!(by_parts(), Err(Error::Tampered { .. })), "{device:#x}");
        machine.poke64(entry, was);
    }
    assert_eq!(by_parts(), Ok(()));
}

#[test]
fn the_mle_notices_what_changed_since_the_slb() {
    let machine = one_unit();
    launch(&machine).unwrap();
    let take_over = |count| AmdVi::take_over(&machine, &ivrs(), dma_area(), &[region()], count).map(|_| ());
    assert_eq!(take_over(1), Ok(()));
    assert_eq!(take_over(2), Err(Error::Count { found: 1, wanted: 2 }));

    let entry = dma_area().entry(0xffff);
    machine.poke64(entry, 0);
    assert!(matches!(take_over(1), Err(Error::Tampered { .. })));
    machine.poke64(entry, dte::DENY[0]);
    assert_eq!(take_over(1), Ok(()));

    for register in [reg::DEVICE_TABLE, reg::CONTROL, reg::EXCLUSION_BASE, reg::EVENT_BASE] {
        let old = machine.with_unit(0, |unit| unit.registers.insert(register, 0x1000)).unwrap();
        assert!(matches!(take_over(1), Err(Error::Register { register: r, .. }) if r == register));
        machine.with_unit(0, |unit| unit.registers.insert(register, old));
    }
    assert_eq!(take_over(1), Ok(()));
}

/// A page table of two levels that maps 2 MiB at `GUEST` to itself, and nothing else.
const GUEST: u64 = 0x0020_0000;
fn guest_table(machine: &Machine) -> Root {
    const LEAF: u64 = 1 | 1 << 61 | 1 << 62;
    machine.poke64(REGION + 0x2000 + 8 * (GUEST >> 21), GUEST | LEAF);
    Root { table: REGION + 0x2000, levels: 2 }
}

#[test]
fn the_guest_has_its_memory_and_no_more() {
    let machine = one_unit();
    launch(&machine).unwrap();
    let mut all = AmdVi::take_over(&machine, &ivrs(), dma_area(), &[region()], 1).unwrap();
    all.open_guest(&machine, guest_table(&machine), Interrupts::Ordinary).unwrap();

    assert!(machine.dma_write(ATTACKER, GUEST + 0x1234, &[1]));
    for address in [GUEST - 1, GUEST + (2 << 20), CANARY, dma_area().entry(0), 0x4000_0020_0000] {
        assert!(!machine.dma_write(ATTACKER, address, &[1]));
    }
    assert!(!machine.dma_write(UNIT, GUEST, &[1]), "the IOMMU's own id stays shut");
    for data in MSI {
        machine.dma_write(ATTACKER, 0xfee0_0000, &data.to_le_bytes());
    }
    assert_eq!(machine.interrupts(), [u64::from(MSI[0])]);

    all.close(&machine).unwrap();
    assert!(!machine.dma_write(ATTACKER, GUEST + 0x1234, &[1]));
    assert_closed(&machine);
}

#[test]
fn without_interrupt_support_all_interrupts_pass() {
    let machine = one_unit();
    let mut all = launch(&machine).unwrap();
    let table = ivrs();
    let choice = Interrupts::for_machine(&Ivrs::new(&table).unwrap());
    assert_eq!(choice, Interrupts::Unchecked);
    all.open_guest(&machine, guest_table(&machine), choice).unwrap();
    for data in MSI {
        assert!(machine.dma_write(ATTACKER, 0xfee0_0000, &data.to_le_bytes()));
    }
}

#[test]
fn an_entry_in_use_is_never_more_open_than_before_or_after() {
    let machine = one_unit();
    let mut all = launch(&machine).unwrap();
    machine.attack(|machine| {
        // No cached entry hides what stands in the table now.
        machine.with_unit(0, |unit| unit.cached_entries.clear());
        machine.dma_write(3, CANARY, b"gotcha!!");
    });
    all.open_guest(&machine, guest_table(&machine), Interrupts::Ordinary).unwrap();
    all.close(&machine).unwrap();
    assert_eq!(machine.peek64(CANARY), 0);

    // The order that suggests itself, lowest byte first, opens everything for a moment.
    all.open_guest(&machine, guest_table(&machine), Interrupts::Ordinary).unwrap();
    machine.write(dma_area().entry(3), &super::dte_bytes(dte::DENY)[..7]);
    assert_eq!(machine.peek64(CANARY), u64::from_le_bytes(*b"gotcha!!"));
}

#[test]
fn a_root_that_no_unit_can_walk_is_refused() {
    let machine = one_unit();
    let mut all = launch(&machine).unwrap();
    for (table, levels) in [(0x1001, 3), (1 << 52, 3), (0x1000, 0), (0x1000, 7)] {
        let root = Root { table, levels };
        let refused = all.open_guest(&machine, root, Interrupts::Ordinary);
        assert_eq!(refused, Err(Error::Root { root, levels: 6 }));
    }
}

#[test]
fn blocked_requests_are_logged_and_drained() {
    let machine = one_unit();
    let all = launch(&machine).unwrap();
    machine.dma_write(ATTACKER, CANARY, &[1]);
    machine.dma_read(ATTACKER, CANARY + 1);
    machine.dma_write(ATTACKER, 0xfee0_0000, &MSI[1].to_le_bytes());
    let mut seen = vec![];
    let drained = all.drain(&machine, |fault| seen.push(fault)).unwrap();
    assert_eq!(drained, Drained { events: 3, overflowed: false, more: false });
    let fault = |address, access, reason| Fault { source: ATTACKER.into(), address, access, reason };
    assert_eq!(
        seen,
        [
            fault(CANARY, Access::Write, Reason::Denied),
            fault(CANARY + 1, Access::Read, Reason::Denied),
            fault(0xfee0_0000, Access::Write, Reason::Interrupt),
        ]
    );
    assert_eq!(all.drain(&machine, |_| {}).unwrap(), Drained::default());
}

#[test]
fn a_storm_of_faults_costs_one_look_no_more_than_its_limit() {
    let machine = one_unit();
    let all = launch(&machine).unwrap();
    for _ in 0..300 {
        machine.dma_write(ATTACKER, CANARY, &[1]);
    }
    let mut counts = vec![];
    loop {
        let mut count = 0;
        let drained = all.drain(&machine, |_| count += 1).unwrap();
        assert_eq!(drained.overflowed, counts.is_empty());
        assert_eq!(drained.events, count);
        counts.push(count);
        if !drained.more {
            break;
        }
    }
    assert_eq!(counts, [64, 64, 64, 63]);
    machine.dma_write(ATTACKER, CANARY, &[1]);
    assert_eq!(all.drain(&machine, |_| {}).unwrap().events, 1);
    all.verify(&machine).unwrap();

    // A device whose faults come as fast as they are taken out: what was there at first is all that is looked at.
    machine.attack(|machine| {
        machine.dma_write(ATTACKER, CANARY, &[1]);
    });
    assert_eq!(all.drain(&machine, |_| {}).unwrap().events, 1);
}

#[test]
fn entries_of_the_log_say_what_the_specification_says() {
    let decode = |code: u64, flags: u64, address| event::decode([code << 60 | flags << 48 | 0x0310, address]);
    for code in [1, 3, 4, 5, 6, 7, 15] {
        assert_eq!(decode(code, 0, 8).reason, Reason::Broken(code as u8));
    }
    assert_eq!(decode(2, 1 << 5, 0xfedf_ffff).reason, Reason::Denied);
    assert_eq!(decode(2, 1 << 5, 0xfef0_0000).access, Access::Write);
    assert_eq!(decode(2, 0xfdf, 0).access, Access::Read);
    assert_eq!(decode(8, 0, 0).access, Access::Unknown);
    assert_eq!(decode(8, 0, 0xfd_f800_0000).reason, Reason::Interrupt);
}

#[test]
fn the_area_lies_at_the_top_of_its_region() {
    assert_eq!(dma_area().range(), PhysRange::new(REGION + REGION_SIZE - (4 << 20), 4 << 20).unwrap());
    for (base, size) in [(REGION, 2 << 20), (REGION + 4096, 8 << 20), (1 << 52, 8 << 20)] {
        assert_eq!(DmaArea::at_top_of(&PhysRange::new(base, size).unwrap()), None);
    }
    let last = dma_area().event_page(super::MAX_UNITS - 1);
    assert!(dma_area().range().contains(&PhysRange::new(last, 4096).unwrap()));
    for random in [0, 4095, u64::MAX] {
        let nowhere = area::nowhere(random);
        assert!(((1 << 52) - (8 << 30)..1 << 52).contains(&nowhere) && nowhere & 0x1f_ffff == 0x1ff);
    }
}

/// A device that reaches the IOMMU's own registers: it turns the table back to the gap's and again to ours, at
/// moments of its own. To stay in, it must be right twice in every round.
#[test]
fn a_device_that_writes_registers_does_not_outlast_the_rounds() {
    let mut refused = 0;
    for seed in 0..32 {
        let machine = one_unit();
        machine.seed(seed << 8);
        gap_left_it_on(&machine, 0, ATTACKER);
        let nowhere = std::cell::Cell::new(0);
        machine.attack(move |machine| {
            let now = machine.with_unit(0, |unit| unit.register(reg::DEVICE_TABLE));
            if now != GAP_TABLE | 0x1ff {
                nowhere.set(now);
            }
            let wanted = if machine.random() & 8 == 0 { GAP_TABLE | 0x1ff } else { nowhere.get() };
            machine.dma_write(ATTACKER, BASE, &wanted.to_le_bytes());
        });
        match launch(&machine) {
            Ok(_) => assert_closed(&machine),
            Err(Error::Register { register: reg::DEVICE_TABLE, .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(refused > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Whatever the gap left, and whatever its devices try after each access: when the launch goes on, nothing is
    /// open, and nothing was from before the table was written.
    #[test]
    fn nothing_gets_through_once_denial_is_promised(
        seed in any::<u64>(),
        on in any::<[bool; 3]>(),
        checks_size in any::<bool>(),
        targets in prop::collection::vec((any::<u16>(), 0u64..0x300), 1..6),
    ) {
        let machine = Machine::new();
        machine.seed(seed);
        let mut table = Table::new();
        for (index, low) in [0u16, 0x4000, 0x8000].into_iter().enumerate() {
            let (device, base) = (low | 2, BASE + 0x4000 * index as u64);
            let last = if index == 2 { u16::MAX } else { low + 0x3fff };
            machine.add_unit(device, base, low..=last, true);
            machine.with_unit(index, |unit| unit.checks_size = checks_size);
            table = table.unit(0x11, device, base, 0, &[]);
        }
        for (device, _) in &targets {
            let index = usize::from((device >> 14).min(2));
            if on[index] {
                gap_left_it_on(&machine, index, *device);
            }
        }
        machine.watch(dma_area().entry(0)..=dma_area().entry(0) + 0x1f_ffff);
        machine.attack(move |machine| {
            for (device, page) in &targets {
                // Pages of the DMA area, then others of the region.
                let address = REGION + REGION_SIZE - (4 << 20) + page * 0x2000;
                machine.dma_write(*device, address % (REGION + REGION_SIZE), &OPEN[0].to_le_bytes());
                machine.dma_write(*device, CANARY, &[1]);
            }
        });
        match deny_all(&machine, &table.finish(), dma_area(), &[region()]) {
            Ok(_) => {
                prop_assert_eq!(machine.breaches(), 0);
                assert_closed(&machine);
            }
            Err(error) => prop_assert!(matches!(error, Error::Tampered { .. }), "{}", error),
        }
    }

    /// What devices reach through the IOMMU is what the description of memory gives them, whatever the layout, and with pages
    /// of whatever size.
    #[test]
    fn devices_reach_what_the_space_gives_them(
        claims in prop::collection::vec((0u64..0x10_0000, 1u64..0x4000, any::<bool>()), 0..12),
        largest in prop::sample::select(vec![PageSize::Size4K, PageSize::Size2M, PageSize::Size1G]),
    ) {
        let machine = one_unit();
        let mut all = launch(&machine).unwrap();
        let mut space = AddressSpace::new(39, region(), None).unwrap();
        for window in all.windows() {
            space.assign(window, Kind::Closed(Hole::IommuRegisters)).unwrap();
        }
        let mut edges = vec![0, REGION, REGION + REGION_SIZE, BASE];
        for (page, pages, ram) in claims {
            let kind = if ram { Kind::Ram } else { Kind::FirmwareData };
            // Small pages for gigabytes would take tables of as many megabytes.
            let pages = if largest == PageSize::Size4K { pages & 0x3ff | 1 } else { pages };
            let range = PhysRange::new(page << 12, pages << 12).unwrap();
            if space.assign(range, kind).is_ok() {
                edges.extend([range.start(), range.last() + 1]);
            }
        }
        let mut pool = Pages::new(&machine, REGION + 0x10_0000, false);
        let tables = Tables::new(&AMD_VI, 4, largest, &mut pool).unwrap();
        space.map_view(View::Device, &tables, &mut pool).unwrap();
        all.open_guest(&machine, Root { table: tables.root(), levels: 4 }, Interrupts::Ordinary).unwrap();
        for edge in edges {
            for address in [edge.saturating_sub(1), edge] {
                if (0xfee0_0000..0xfef0_0000).contains(&address) {
                    continue;
                }
                let page = PhysRange::new(address, 1).unwrap();
                let permits = space.permits(View::Device, page, Rights::READ | Rights::WRITE);
                prop_assert_eq!(machine.dma_read(ATTACKER, address), permits, "{:#x}", address);
            }
        }
    }
}
