//! A local APIC over an INIT: what its owner set, and what waited in it.
//!
//! INIT resets all registers but the ID. Interrupts that wait can't be put back as such: they are sent to this CPU anew. Those
//! that are in service can't come back at all, and those that a device holds until their end is announced would hold it
//! for ever: so there must be none when the registers are read ([`Xapic::can_be_reset`]).
//!
//! Spec: \[APM2\] "Local APIC Registers", "APIC Timer Operation", "Extended Interrupts [3:0] Local Vector Table".

use hv::io::Mmio;

use crate::apic::{ICR_HIGH, Xapic};

const VERSION: u32 = 0x30;
const TASK_PRIORITY: u32 = 0x80;
const LOGICAL_DESTINATION: u32 = 0xd0;
const DESTINATION_FORMAT: u32 = 0xe0;
const SPURIOUS: u32 = 0xf0;
const IN_SERVICE: u32 = 0x100;
const TRIGGER_MODE: u32 = 0x180;
const REQUESTED: u32 = 0x200;
const TIMER: u32 = 0x320;
const INITIAL_COUNT: u32 = 0x380;
const CURRENT_COUNT: u32 = 0x390;
const DIVIDE: u32 = 0x3e0;
/// Extended features: how many extended vectors there are, in bits 23:16.
const EXTENDED_FEATURES: u32 = 0x400;
const EXTENDED_VECTOR: u32 = 0x500;
/// Words of a register with a bit for each vector.
const WORDS: u32 = 8;
/// VERSION: there are extended registers.
const EXTENDED: u32 = 1 << 31;
/// TIMER: it begins anew by itself.
const PERIODIC: u32 = 1 << 17;

/// What is set again, in this order: while an APIC is off, what its local vectors do cannot be set.
const KEPT: [u32; 12] = [
    LOGICAL_DESTINATION,
    DESTINATION_FORMAT,
    SPURIOUS,
    ICR_HIGH,
    DIVIDE,
    // The timer, thermal sensor, performance counters, both pins, errors.
    TIMER,
    0x330,
    0x340,
    0x350,
    0x360,
    0x370,
    TASK_PRIORITY,
];
const EXTENDED_VECTORS: usize = 4;

/// Registers of one CPU's APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptApic {
    kept: [u32; KEPT.len()],
    extended: [u32; EXTENDED_VECTORS],
    initial: u32,
    left: u32,
    /// A bit for each vector that waits.
    waiting: [u32; WORDS as usize],
}

/// The 32-bit words of a register that has a bit for each vector.
fn words<M: Mmio>(apic: &Xapic<M>, register: u32) -> impl Iterator<Item = u32> + use<'_, M> {
    (register..).step_by(0x10).take(WORDS as usize).map(|at| apic.0.read32(at))
}

/// How many extended local vectors there are.
fn extended_vectors(apic: &Xapic<impl Mmio>) -> usize {
    match apic.0.read32(VERSION) & EXTENDED {
        0 => 0,
        _ => (apic.0.read32(EXTENDED_FEATURES) >> 16 & 0xff) as usize,
    }
}

fn extended_registers(count: usize) -> impl Iterator<Item = u32> {
    (EXTENDED_VECTOR..).step_by(0x10).take(count.min(EXTENDED_VECTORS))
}

impl<M: Mmio> Xapic<M> {
    /// Whether a reset loses nothing that [`KeptApic`] cannot bring back.
    pub fn can_be_reset(&self) -> bool {
        let level = words(self, REQUESTED).zip(words(self, TRIGGER_MODE)).any(|(irr, tmr)| irr & tmr != 0);
        !level && words(self, IN_SERVICE).all(|word| word == 0)
    }
}

impl KeptApic {
    /// As they are now. The CPU takes no interrupt from here to its INIT.
    pub fn of(apic: &Xapic<impl Mmio>) -> Self {
        let mut this = Self {
            kept: KEPT.map(|register| apic.0.read32(register)),
            extended: [0; EXTENDED_VECTORS],
            initial: apic.0.read32(INITIAL_COUNT),
            left: apic.0.read32(CURRENT_COUNT),
            waiting: [0; WORDS as usize],
        };
        for (value, at) in this.extended.iter_mut().zip(extended_registers(extended_vectors(apic))) {
            *value = apic.0.read32(at);
        }
        // After the count: of a timer that runs out between the two, either the count is left or its interrupt waits.
        this.waiting.iter_mut().zip(words(apic, REQUESTED)).for_each(|(to, word)| *to = word);
        this
    }

    /// Sets them again, after an INIT of the same CPU. A timer goes on where it was: the time between is not its own; a
    /// periodic one begins with a whole period.
    pub fn restore(&self, apic: &Xapic<impl Mmio>) {
        for (register, value) in KEPT.into_iter().zip(self.kept) {
            apic.0.write32(register, value);
        }
        for (at, value) in extended_registers(extended_vectors(apic)).zip(self.extended) {
            apic.0.write32(at, value);
        }
        let timer = KEPT.into_iter().zip(self.kept).find(|(register, _)| *register == TIMER);
        let periodic = timer.is_some_and(|(_, value)| value & PERIODIC != 0);
        let count = if periodic { self.initial } else { self.left };
        if count != 0 {
            apic.0.write32(INITIAL_COUNT, count);
        }
        for (first, word) in (0..).step_by(32).zip(self.waiting) {
            apic.send_to_self(first, word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apic::ICR_LOW;
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    /// An APIC as far as INIT and writes of its registers go.
    struct Apic(RefCell<BTreeMap<u32, u32>>);

    impl Apic {
        fn after_init() -> Self {
            let this = Self(RefCell::default());
            for vector in (0x320..=0x370).step_by(0x10) {
                this.set(vector, 0x1_0000);
            }
            this.set(SPURIOUS, 0xff);
            this.set(DESTINATION_FORMAT, u32::MAX);
            this.set(VERSION, EXTENDED | 0x50010);
            this.set(EXTENDED_FEATURES, 4 << 16);
            this
        }
        fn set(&self, register: u32, value: u32) {
            self.0.borrow_mut().insert(register, value);
        }
        fn get(&self, register: u32) -> u32 {
            self.0.borrow().get(&register).copied().unwrap_or(0)
        }
        fn request(&self, vector: u32) {
            let at = REQUESTED + vector / 32 * 0x10;
            self.set(at, self.get(at) | 1 << (vector % 32));
        }
        /// The APIC of a guest: everything is set, the timer runs, two interrupts wait.
        fn in_use(timer: u32) -> Self {
            let this = Self::after_init();
            for (at, value) in [
                (SPURIOUS, 0x1ff),
                (TASK_PRIORITY, 0x20),
                (LOGICAL_DESTINATION, 0x200_0000),
                (DESTINATION_FORMAT, 0x0fff_ffff),
                (TIMER, timer),
                (DIVIDE, 3),
                (0x340, 0x400),
                (0x350, 0x700),
                (0x370, 0xfe),
                (0x510, 0xf9),
                (ICR_HIGH, 0x300_0000),
            ] {
                this.set(at, value);
            }
            this.set(INITIAL_COUNT, 5000);
            this.set(CURRENT_COUNT, 70);
            this.request(0x31);
            this.request(0xfd);
            this
        }
    }

    impl Mmio for &Apic {
        fn read32(&self, register: u32) -> u32 {
            self.get(register)
        }
        fn write32(&self, register: u32, value: u32) {
            let value = match register {
                // Off, it keeps local vectors masked.
                0x320..=0x370 if self.get(SPURIOUS) & 1 << 8 == 0 => value | 1 << 16,
                _ => value,
            };
            match register {
                ICR_LOW if value & 1 << 18 != 0 => self.request(value & 0xff),
                INITIAL_COUNT => self.set(CURRENT_COUNT, value),
                _ => {}
            }
            self.set(register, value);
        }
        crate::fake::registers_of_four_bytes!();
    }

    fn without(registers: &Apic, left_out: &[u32]) -> BTreeMap<u32, u32> {
        registers.0.borrow().iter().map(|(k, v)| (*k, *v)).filter(|(k, _)| !left_out.contains(k)).collect()
    }

    #[test]
    fn after_an_init_everything_is_as_before() {
        let before = Apic::in_use(0xec);
        let kept = KeptApic::of(&Xapic(&before));
        let after = Apic::after_init();
        kept.restore(&Xapic(&after));
        let (command, initial) = (ICR_LOW, INITIAL_COUNT);
        let zero = |(_, value): &(u32, u32)| *value != 0;
        let same: BTreeMap<_, _> = without(&before, &[command, initial]).into_iter().filter(zero).collect();
        let now: BTreeMap<_, _> = without(&after, &[command, initial]).into_iter().filter(zero).collect();
        assert_eq!(now, same);
        // The one-shot timer has what was left.
        assert_eq!(after.get(INITIAL_COUNT), 70);
    }

    #[test]
    fn a_periodic_timer_begins_a_whole_period() {
        let kept = KeptApic::of(&Xapic(&Apic::in_use(0xec | PERIODIC)));
        let after = Apic::after_init();
        kept.restore(&Xapic(&after));
        assert_eq!((after.get(TIMER), after.get(INITIAL_COUNT)), (0xec | PERIODIC, 5000));
    }

    #[test]
    fn a_timer_that_ran_out_stays_so() {
        let before = Apic::in_use(0xec);
        before.set(CURRENT_COUNT, 0);
        let after = Apic::after_init();
        KeptApic::of(&Xapic(&before)).restore(&Xapic(&after));
        assert_eq!(after.get(INITIAL_COUNT), 0);
    }

    #[test]
    fn what_cannot_come_back_is_waited_for() {
        let apic = Apic::in_use(0xec);
        assert!(Xapic(&apic).can_be_reset());
        apic.set(TRIGGER_MODE + 0x10, 1 << 17);
        assert!(!Xapic(&apic).can_be_reset(), "level-triggered 31h waits");
        apic.set(TRIGGER_MODE + 0x10, 1 << 18);
        assert!(Xapic(&apic).can_be_reset(), "32h does not wait");
        apic.set(IN_SERVICE + 0x70, 1);
        assert!(!Xapic(&apic).can_be_reset(), "E0h is in service");
    }

    #[test]
    fn an_apic_without_extended_registers_has_none_touched() {
        let before = Apic::in_use(0xec);
        before.set(VERSION, 0x50014);
        let after = Apic::after_init();
        after.set(VERSION, 0x50014);
        KeptApic::of(&Xapic(&before)).restore(&Xapic(&after));
        assert_eq!(after.get(0x510), 0);
    }
}
