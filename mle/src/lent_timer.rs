//! The guest's APIC timer, borrowed while firmware runs in a call that the guest made with interrupts off.
//!
//! Such a guest takes no interrupt at which the MLE could stop firmware that loops, and an interrupt that is pending already
//! comes no second time. So the MLE waits with a timer of its own: the CPU's only one that the guest cannot reach meanwhile,
//! since it does not run. Interrupts of the guest below the top priority class stay pending in the APIC; those of that class
//! (in Linux messages between CPUs) are taken in the host, and sent to this CPU anew when the timer is given back.
//!
//! Spec: \[APM2\] "Local APIC": APIC Timer Operation, Interrupt priority.

use hv::io::Mmio;

use crate::apic::{ICR_LOW, Xapic};
use crate::trap::WAKE_VECTOR;

const TASK_PRIORITY: u32 = 0x80;
const SPURIOUS: u32 = 0xf0;
const TIMER: u32 = 0x320;
const INITIAL_COUNT: u32 = 0x380;
const CURRENT_COUNT: u32 = 0x390;

/// SPURIOUS: the APIC is on.
const ENABLED: u32 = 1 << 8;
/// TIMER: no interrupt.
const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;
/// TIMER: the mode that the MLE does not take over, and CPUs of this kind do not have.
const DEADLINE: u32 = 1 << 18;
/// Holds back all but the top class.
const TOP_CLASS_ONLY: u32 = 0xe0;
/// ICR: to this CPU.
const SELF: u32 = 1 << 18;
/// A slice in ticks of the timer: milliseconds at the rates of today's CPUs and any divisor.
const SLICE: u32 = 1 << 18;

/// The timer's registers as the guest left them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LentTimer {
    timer: u32,
    initial: u32,
    /// What was left of the guest's count.
    left: u32,
    priority: u32,
    /// Ticks of slices that are over.
    used: u64,
}

impl LentTimer {
    /// Takes the timer. `None` when the APIC is off or the timer is in TSC-deadline mode.
    pub fn borrow(apic: &Xapic<impl Mmio>) -> Option<Self> {
        let (timer, enabled) = (apic.0.read32(TIMER), apic.0.read32(SPURIOUS) & ENABLED != 0);
        if !enabled || timer & DEADLINE != 0 {
            return None;
        }
        let (initial, left) = (apic.0.read32(INITIAL_COUNT), apic.0.read32(CURRENT_COUNT));
        let priority = apic.0.read32(TASK_PRIORITY);
        apic.0.write32(TASK_PRIORITY, TOP_CLASS_ONLY);
        let mut this = Self { timer, initial, left, priority, used: 0 };
        this.begin_slice(apic);
        Some(this)
    }

    fn begin_slice(&mut self, apic: &Xapic<impl Mmio>) {
        apic.0.write32(TIMER, u32::from(WAKE_VECTOR));
        apic.0.write32(INITIAL_COUNT, SLICE);
    }

    /// After an interrupt: begins the next slice if this one is over.
    pub fn go_on(&mut self, apic: &Xapic<impl Mmio>) {
        if apic.0.read32(CURRENT_COUNT) == 0 {
            self.used = self.used.saturating_add(SLICE.into());
            self.begin_slice(apic);
        }
    }

    /// Gives the timer back, as if the guest's count had gone on. `held` has a bit for each vector, from E0h on, that came
    /// for the guest meanwhile. `drain` takes what is pending of the MLE's own.
    pub fn give_back(self, apic: &Xapic<impl Mmio>, drain: impl FnOnce() -> u32) {
        let unused = apic.0.read32(CURRENT_COUNT);
        apic.0.write32(TIMER, MASKED | u32::from(WAKE_VECTOR));
        let held = drain();
        let used = self.used.saturating_add(SLICE.saturating_sub(unused).into());
        apic.0.write32(TIMER, self.timer);
        let left =
            u64::from(self.left).checked_sub(used).and_then(|n| u32::try_from(n).ok()).filter(|n| *n != 0);
        // A count of zero may be one that ran out this moment, its interrupt not sent yet: a change of TIMER takes that back.
        // If it was sent, a second one merges with it, or a one-shot timer's handler finds nothing due.
        let ran = self.left != 0 || (self.initial != 0 && self.timer & PERIODIC == 0);
        let expired = ran && left.is_none();
        apic.0.write32(
            INITIAL_COUNT,
            match left {
                // A periodic timer goes on with a whole period: its phase cannot be set.
                _ if ran && self.timer & PERIODIC != 0 => self.initial,
                Some(left) => left,
                None => 0,
            },
        );
        apic.0.write32(TASK_PRIORITY, self.priority);
        if expired && self.timer & MASKED == 0 {
            apic.0.write32(ICR_LOW, SELF | (self.timer & 0xff));
        }
        apic.send_to_self(0xe0, held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    /// Registers; the count is what the test sets.
    #[derive(Default)]
    struct Apic {
        registers: RefCell<BTreeMap<u32, u32>>,
        sent: RefCell<Vec<u32>>,
    }

    impl Apic {
        fn set(&self, register: u32, value: u32) {
            self.registers.borrow_mut().insert(register, value);
        }
    }

    impl Mmio for &Apic {
        fn read32(&self, register: u32) -> u32 {
            self.registers.borrow().get(&register).copied().unwrap_or(0)
        }
        fn write32(&self, register: u32, value: u32) {
            if register == ICR_LOW {
                self.sent.borrow_mut().push(value);
            }
            if register == INITIAL_COUNT {
                self.set(CURRENT_COUNT, value);
            }
            self.set(register, value);
        }
        crate::fake::registers_of_four_bytes!();
    }

    fn guests(timer: u32, initial: u32, current: u32) -> Apic {
        let apic = Apic::default();
        for (register, value) in [
            (SPURIOUS, 0x1ff),
            (TIMER, timer),
            (INITIAL_COUNT, initial),
            (CURRENT_COUNT, current),
            (TASK_PRIORITY, 0x10),
        ] {
            apic.set(register, value);
        }
        apic
    }

    #[test]
    fn a_one_shot_timer_goes_on_where_it_would_be() {
        let apic = guests(0xec, 900_000, 800_000);
        let x = Xapic(&apic);
        let mut lent = LentTimer::borrow(&x).unwrap();
        assert_eq!(x.0.read32(TASK_PRIORITY), TOP_CLASS_ONLY);
        assert_eq!((x.0.read32(TIMER), x.0.read32(INITIAL_COUNT)), (0xf0, SLICE));
        apic.set(CURRENT_COUNT, 0);
        lent.go_on(&x);
        apic.set(CURRENT_COUNT, SLICE - 1000);
        lent.go_on(&x);
        lent.give_back(&x, || 0);
        assert_eq!((x.0.read32(TIMER), x.0.read32(INITIAL_COUNT)), (0xec, 800_000 - SLICE - 1000));
        assert_eq!((x.0.read32(TASK_PRIORITY), apic.sent.borrow().len()), (0x10, 0));
    }

    #[test]
    fn an_interrupt_that_was_missed_comes_late_and_once() {
        for (timer, initial) in [(0xec, 0), (0xec | PERIODIC, 5000)] {
            let apic = guests(timer, 5000, 10);
            let x = Xapic(&apic);
            let lent = LentTimer::borrow(&x).unwrap();
            apic.set(CURRENT_COUNT, SLICE - 2000);
            lent.give_back(&x, || 1 << (0xfd & 31));
            assert_eq!((x.0.read32(TIMER), x.0.read32(INITIAL_COUNT)), (timer, initial));
            assert_eq!(*apic.sent.borrow(), [SELF | 0xec, SELF | 0xfd]);
        }
    }

    #[test]
    fn an_interrupt_that_taking_the_timer_may_have_stopped_is_sent() {
        let apic = guests(0xec, 5000, 0);
        let x = Xapic(&apic);
        LentTimer::borrow(&x).unwrap().give_back(&x, || 0);
        assert_eq!(*apic.sent.borrow(), [SELF | 0xec]);
        // Once only: the count is not one that ran out any more.
        LentTimer::borrow(&x).unwrap().give_back(&x, || 0);
        assert_eq!(apic.sent.borrow().len(), 1);
    }

    #[test]
    fn a_timer_that_does_not_run_stays_so() {
        for (timer, initial) in [(0xec, 0), (0xec | MASKED, 5000), (0xec | PERIODIC, 5000)] {
            let apic = guests(timer, initial, 0);
            let x = Xapic(&apic);
            LentTimer::borrow(&x).unwrap().give_back(&x, || 0);
            assert_eq!((x.0.read32(TIMER), x.0.read32(INITIAL_COUNT)), (timer, 0));
            assert!(apic.sent.borrow().is_empty());
        }
        assert_eq!(LentTimer::borrow(&Xapic(&guests(DEADLINE, 0, 0))), None);
        assert_eq!(LentTimer::borrow(&Xapic(&Apic::default())), None);
    }
}
