//! The shown unit, driven as Linux 6.1 does it.

use super::*;
use crate::vt_d::defs::global::{COMPATIBLE, INTERRUPT_POINTER, INTERRUPTS, QUEUE};
use crate::vt_d::shown::{GuestRam, Outcome, Shown};

const RING: u64 = GUEST + 0x1000;
const STATUS: u64 = GUEST + 0x2000;
const TABLE: u64 = GUEST + 0x10_0000;
const DEVICE: u16 = 0x0310;
const INVALIDATE_ALL: [u64; 2] = [4, 0];
const VECTOR: u64 = 0x41;
/// Present, logical, one of the CPUs, to the set 3.
const TO: u64 = 0x0000_0300_0000_000d;
/// The whole source id.
const EXACT: u64 = 1 << 18;

/// A guest whose devices reach 4 MiB at [`GUEST`], and its driver.
struct Driver {
    machine: Machine,
    all: VtD<Window>,
    shown: Shown,
    command: u32,
    tail: u64,
    last: Outcome,
}

impl Driver {
    fn new(machine: Machine, interrupts: Interrupts) -> Self {
        let (all, ..) = open(&machine, interrupts).unwrap();
        Self { machine, all, shown: Shown::default(), command: 0, tail: 0, last: Outcome::default() }
    }

    fn word(&mut self, offset: u32, word: u64) {
        let guest = PhysRange::new(GUEST, 4 << 20).unwrap();
        let reaches = |at, len| PhysRange::new(at, len).is_some_and(|range| guest.contains(&range));
        let ram = GuestRam { mem: &self.machine, reaches: &reaches };
        self.last = self.shown.write((offset, word), &mut self.all, &self.machine, &ram).unwrap();
    }

    /// As a CPU writes 32 bits: the others of the word stay as they were read.
    fn write32(&mut self, offset: u32, value: u32) {
        let shift = offset % 8 * 8;
        let word = self.shown.read(offset) & !(0xffff_ffff << shift) | u64::from(value) << shift;
        self.word(offset, word);
    }

    fn read32(&self, offset: u32) -> u32 {
        (self.shown.read(offset) >> (offset % 8 * 8)) as u32
    }

    fn switch(&mut self, bit: u32, on: bool) {
        self.command = if on { self.command | bit } else { self.command & !bit };
        self.write32(reg::GCMD, self.command);
        assert_eq!(self.read32(reg::GSTS) & bit != 0, on);
    }

    /// Queues descriptors and a wait behind them; whether it came to the wait.
    fn submit(&mut self, descriptors: &[[u64; 2]]) -> bool {
        self.machine.poke64(STATUS, 1);
        for [low, high] in descriptors.iter().chain(&[[5 | 1 << 5 | 2 << 32, STATUS]]) {
            self.machine.poke64(RING + self.tail, *low);
            self.machine.poke64(RING + self.tail + 8, *high);
            self.tail = (self.tail + 16) % 4096;
        }
        self.write32(reg::IQT, self.tail as u32);
        self.machine.peek64(STATUS) == 2
    }

    /// `intel_setup_irq_remapping` and `iommu_enable_irq_remapping`.
    fn enable(&mut self) {
        self.write32(reg::FSTS, 0x7f);
        self.write32(reg::IQT, 0);
        self.tail = 0;
        self.word(reg::IQA, RING);
        self.switch(QUEUE, true);
        self.word(reg::IRTA, TABLE | 0xf);
        self.write32(reg::GCMD, self.command | INTERRUPT_POINTER);
        assert_ne!(self.read32(reg::GSTS) & INTERRUPT_POINTER, 0);
        assert!(self.submit(&[INVALIDATE_ALL]));
        self.switch(INTERRUPTS, true);
        assert_eq!(self.read32(reg::GSTS) & COMPATIBLE, 0);
    }

    /// `modify_irte`.
    fn set(&mut self, index: u16, [low, high]: [u64; 2]) {
        self.machine.poke64(TABLE + u64::from(index) * 16, low);
        self.machine.poke64(TABLE + u64::from(index) * 16 + 8, high);
        assert!(self.submit(&[[4 | 1 << 4 | u64::from(index) << 32, 0]]));
        self.all.verify(&self.machine).unwrap();
    }

    fn sends(&self, device: u16, index: u16) -> Option<u64> {
        let before = self.machine.interrupts().len();
        let passed = self.machine.dma_write(device, remappable(index.into()), &0u32.to_le_bytes());
        assert_eq!(passed, self.machine.interrupts().len() > before);
        passed.then(|| *self.machine.interrupts().last().unwrap())
    }

    fn sends_compatible(&self, data: u32) -> bool {
        self.machine.dma_write(DEVICE, COMPATIBLE_MSI, &data.to_le_bytes())
    }
}

fn entry(vector: u64) -> [u64; 2] {
    [TO | vector << 16, EXACT | u64::from(DEVICE)]
}

#[test]
fn linux_takes_it_for_a_unit_without_translation() {
    let shown = Shown::default();
    let can = super::super::defs::Capabilities { cap: shown.read(reg::CAP), ecap: shown.read(reg::ECAP) };
    assert!((3..=5).all(|levels| !can.walks(levels)), "SAGAW");
    assert!(can.queue() && can.interrupts() && can.coherent() && !can.page_requests());
    assert!(can.ecap & 1 << 4 == 0, "EIM: 32-bit destinations");
    assert_eq!((can.window_size(), can.fault_records()), (4096, 1));
    assert_eq!(shown.read(0) as u32, 0x10);
}

#[test]
fn a_guests_driver_turns_it_on_and_devices_send_what_it_says() {
    for before in [Interrupts::Compatible, Interrupts::Unchecked] {
        let mut driver = Driver::new(one_unit(), before);
        assert!(MSI.iter().all(|data| driver.sends_compatible(*data)));
        driver.enable();
        assert!(driver.last.enabled);
        assert!(!MSI.iter().any(|data| driver.sends_compatible(*data)));
        assert_eq!(driver.sends(DEVICE, 7), None);
        driver.set(7, entry(VECTOR));
        assert_eq!(driver.sends(DEVICE, 7), Some(VECTOR));
        assert_eq!(driver.sends(DEVICE + 1, 7), None);
        assert_eq!(driver.last, Outcome::default());

        // Not before it says so.
        driver.machine.poke64(TABLE + 7 * 16, TO | 0x42 << 16);
        assert_eq!(driver.sends(DEVICE, 7), Some(VECTOR));
        driver.set(7, entry(0x42));
        assert_eq!(driver.sends(DEVICE, 7), Some(0x42));
        driver.set(7, [0; 2]);
        assert_eq!(driver.sends(DEVICE, 7), None);

        // Another kernel takes over: its table is empty.
        driver.set(8, entry(VECTOR));
        driver.switch(INTERRUPTS, false);
        assert_eq!(driver.sends(DEVICE, 8), None);
        assert!(!MSI.iter().any(|data| driver.sends_compatible(*data)), "what was given up stays so");
        driver.switch(QUEUE, false);
        driver.enable();
        assert_eq!(driver.sends(DEVICE, 8), Some(VECTOR), "of the table that it named again");
    }
}

#[test]
fn what_no_device_may_send_is_refused_by_name() {
    let mut driver = Driver::new(one_unit(), Interrupts::Compatible);
    driver.enable();
    let [low, high] = entry(VECTOR);
    for (bad, why) in [
        ([low | 2 << 5, high], "delivery mode 2, not 0 or 1"),
        ([low | 4 << 5, high], "delivery mode 4, not 0 or 1"),
        ([low | 5 << 5, high], "delivery mode 5, not 0 or 1"),
        ([low | 7 << 5, high], "delivery mode 7, not 0 or 1"),
        ([TO | 15 << 16, high], "vector 15, not 16 to 254"),
        ([TO | 255 << 16, high], "vector 255, not 16 to 254"),
        ([low, high & !EXACT], "no check of the sender"),
        ([low, high | 3 << 18], "no check of the sender"),
        ([low | 1 << 15, high], "bits 0:0000000000008000, not 0"),
        ([low | 1 << 32, high | 1 << 20], "bits 100000:0000000100000000, not 0"),
    ] {
        driver.set(7, entry(VECTOR));
        driver.set(7, bad);
        let (index, refused) = driver.last.first.unwrap();
        assert_eq!((driver.last.refused, index, refused.to_string().as_str()), (1, 7, why));
        assert_eq!(driver.sends(DEVICE, 7), None, "{why}");
    }
    // What Linux writes for the HPET, and for devices behind a bridge to PCI.
    driver.set(9, [low, EXACT | 3 << 16 | u64::from(DEVICE)]);
    driver.set(10, [low | 1 << 4, 2 << 18 | 0x0305]);
    assert_eq!(driver.last, Outcome::default());
}

#[test]
fn an_entry_that_changes_while_it_is_looked_at_is_no_way_round() {
    let mut driver = Driver::new(one_unit(), Interrupts::Compatible);
    driver.enable();
    driver.machine.poke64(TABLE + 7 * 16 + 8, EXACT | u64::from(DEVICE));
    let flip = Cell::new(false);
    driver.machine.attack(move |machine| {
        let mode = if flip.replace(!flip.get()) { 4 << 5 } else { 0 };
        machine.poke64(TABLE + 7 * 16, TO | mode | VECTOR << 16);
        // Nothing but what was checked is ever there to be sent.
        machine.dma_write(DEVICE, remappable(7), &[0; 4]);
    });
    for _ in 0..5 {
        driver.submit(&[[4 | 1 << 4 | 7 << 32, 0], INVALIDATE_ALL]);
    }
    driver.machine.peace();
    assert!(driver.machine.interrupts().iter().all(|sent| *sent == VECTOR));
}

#[test]
fn nothing_but_the_guests_memory_is_read_or_written() {
    let mut driver = Driver::new(one_unit(), Interrupts::Compatible);
    driver.enable();
    driver.machine.poke64(CANARY, 1);
    // A status word in the MLE's memory.
    driver.submit(&[[5 | 1 << 5 | 7 << 32, CANARY]]);
    assert_eq!(driver.machine.peek64(CANARY), 1);
    assert_eq!(driver.read32(reg::FSTS), 1 << 4, "the queue stops");
    driver.write32(reg::FSTS, 1 << 4);
    assert_eq!(driver.read32(reg::FSTS), 1 << 4, "at the same descriptor again");

    // A table that reaches into the MLE's memory, where entries are that would do.
    let mut driver = Driver::new(one_unit(), Interrupts::Compatible);
    driver.enable();
    let [low, high] = entry(VECTOR);
    driver.machine.poke64(CANARY, low);
    driver.machine.poke64(CANARY + 8, high);
    driver.word(reg::IRTA, (CANARY & !0xfff) | 0xf);
    driver.write32(reg::GCMD, driver.command | INTERRUPT_POINTER);
    assert!(driver.submit(&[INVALIDATE_ALL]));
    assert_eq!(driver.sends(DEVICE, 0), None);
}

#[test]
fn a_table_ends_where_it_says() {
    let mut driver = Driver::new(one_unit(), Interrupts::Compatible);
    driver.enable();
    driver.word(reg::IRTA, TABLE | 1);
    driver.write32(reg::GCMD, driver.command | INTERRUPT_POINTER);
    let [low, high] = entry(VECTOR);
    for index in 0..8 {
        driver.machine.poke64(TABLE + index * 16, low);
        driver.machine.poke64(TABLE + index * 16 + 8, high);
    }
    // Eight entries at 5: those at 0 to 7.
    assert!(driver.submit(&[[4 | 1 << 4 | 3 << 27 | 5 << 32, 0]]));
    let sent: Vec<_> = (0..8).filter(|index| driver.sends(DEVICE, *index).is_some()).collect();
    assert_eq!(sent, [0, 1, 2, 3]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever a guest writes, to registers and queue: nothing but fixed and lowest-priority interrupts get through once
    /// compatibility format is blocked.
    #[test]
    fn nothing_that_a_guest_writes_lets_a_device_send_more(
        writes in prop::collection::vec((0u32..0x100, any::<u64>()), 0..24),
        descriptors in prop::collection::vec((0u64..8, any::<u64>(), any::<u64>()), 0..8),
        entries in prop::collection::vec((0u16..4, any::<u64>(), any::<u64>()), 0..8),
    ) {
        let mut driver = Driver::new(one_unit(), Interrupts::Compatible);
        driver.enable();
        for (index, low, high) in entries {
            driver.machine.poke64(TABLE + u64::from(index) * 16, low & 0x00ff_ffff | 1);
            driver.machine.poke64(TABLE + u64::from(index) * 16 + 8, high & 0xf_ffff);
        }
        let descriptors: Vec<_> = descriptors.into_iter().map(|(kind, low, high)| [low & !0xf | kind, high]).collect();
        driver.submit(&[INVALIDATE_ALL]);
        driver.submit(&descriptors);
        for (offset, word) in writes {
            driver.word(offset, word);
        }
        driver.all.verify(&driver.machine).unwrap();
        for index in 0..4 {
            if let Some(sent) = driver.sends(DEVICE, index) {
                prop_assert!(sent >> 8 <= 1 && (16..=254).contains(&(sent & 0xff)), "{sent:#x}");
            }
        }
        prop_assert!(!MSI.iter().any(|data| driver.sends_compatible(*data)));
    }
}
