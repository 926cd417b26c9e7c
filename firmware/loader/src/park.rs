//! Puts the other processors where SKINIT needs them: into INIT, waiting for a start-up interrupt.
//!
//! Spec: \[APM2\] "Multiprocessor Considerations" of SKINIT; "Local APIC", "Interrupt Command Register".

use hv::io::{Clock, Mmio, Msr, TimedOut, poll_until};

use crate::machine::Refusal;

/// APIC_BASE: address and mode of the local APIC.
pub const APIC_BASE: u32 = 0x1b;
/// APIC_BASE: this is the boot processor.
const BSP: u64 = 1 << 8;
/// APIC_BASE: x2APIC mode.
const X2APIC: u64 = 1 << 10;
/// APIC_BASE: the APIC is on.
const ENABLED: u64 = 1 << 11;
/// APIC_BASE: the address bits.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Where the register page is after a reset. A moved one is of no use: the SLB stage refuses it.
pub const APIC_PAGE: u64 = 0xfee0_0000;

/// ICR, low half, in the register page.
const ICR_LOW: u32 = 0x300;
/// ICR, high half.
const ICR_HIGH: u32 = 0x310;
/// ICR in x2APIC mode, one MSR.
const X2APIC_ICR: u32 = 0x830;
/// ICR: delivery pending.
const PENDING: u32 = 1 << 12;
/// ICR: INIT, level asserted, to all but the sender.
const INIT_ALL_OTHERS: u32 = (0b101 << 8) | (1 << 14) | (0b11 << 18);

/// Longest wait for the INIT to leave, microseconds.
const SEND_BUDGET_US: u64 = 100_000;
/// Time for the others to arrive in INIT, microseconds. SKINIT may come some thousand cycles after the INIT left.
pub const SETTLE_US: u64 = 20_000;

/// How the local APIC is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apic {
    /// By registers at [`APIC_PAGE`].
    Page,
    /// By MSRs.
    X2,
}

/// Finds the local APIC of this processor, which must be the boot processor: only that one may run SKINIT.
pub fn find(msr: &impl Msr) -> Result<Apic, Refusal> {
    let base = msr.rdmsr(APIC_BASE);
    if base & ENABLED == 0 || base & BSP == 0 || base & ADDRESS != APIC_PAGE {
        return Err(Refusal::Apic(base));
    }
    Ok(if base & X2APIC != 0 { Apic::X2 } else { Apic::Page })
}

/// Sends INIT to all other processors and waits until they have had time to get there. `page` is the APIC's register
/// page, `None` in x2APIC mode.
pub fn park_others(page: Option<&impl Mmio>, msr: &impl Msr, clock: &impl Clock) -> Result<(), TimedOut> {
    match page {
        Some(page) => {
            page.write32(ICR_HIGH, 0);
            page.write32(ICR_LOW, INIT_ALL_OTHERS);
            poll_until(clock, SEND_BUDGET_US, || page.read32(ICR_LOW) & PENDING == 0)?;
        }
        None => msr.wrmsr(X2APIC_ICR, INIT_ALL_OTHERS.into()),
    }
    let start = clock.now_us();
    while clock.now_us().saturating_sub(start) < SETTLE_US {
        clock.relax();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::{Cell, RefCell};

    /// A local APIC that needs some polls to send; also its MSRs and a clock, so that their order can be seen.
    #[derive(Default)]
    struct Machine {
        base: u64,
        busy: Cell<u32>,
        sent: RefCell<Vec<(u32, u64)>>,
        time: Cell<u64>,
    }

    impl Mmio for Machine {
        fn read8(&self, _: u32) -> u8 {
            panic!("the APIC takes 32-bit accesses")
        }
        fn read32(&self, offset: u32) -> u32 {
            assert_eq!(offset, ICR_LOW);
            let left = self.busy.get();
            self.busy.set(left.saturating_sub(1));
            if left > 0 { PENDING } else { 0 }
        }
        fn read64(&self, _: u32) -> u64 {
            panic!("the APIC takes 32-bit accesses")
        }
        fn write8(&self, _: u32, _: u8) {
            panic!("the APIC takes 32-bit accesses")
        }
        fn write32(&self, offset: u32, value: u32) {
            self.sent.borrow_mut().push((offset, value.into()));
        }
        fn write64(&self, _: u32, _: u64) {
            panic!("the APIC takes 32-bit accesses")
        }
    }

    impl Msr for Machine {
        fn rdmsr(&self, index: u32) -> u64 {
            assert_eq!(index, APIC_BASE);
            self.base
        }
        fn wrmsr(&self, index: u32, value: u64) {
            self.sent.borrow_mut().push((index, value));
        }
    }

    impl Clock for Machine {
        fn now_us(&self) -> u64 {
            self.time.set(self.time.get() + 7);
            self.time.get()
        }
    }

    #[test]
    fn the_apic_is_found_in_its_mode() {
        let at = |base| find(&Machine { base, ..Machine::default() });
        assert_eq!(at(0xfee0_0900), Ok(Apic::Page));
        assert_eq!(at(0xfee0_0d00), Ok(Apic::X2));
        assert_eq!(at(0xfee0_0100), Err(Refusal::Apic(0xfee0_0100)));
        assert_eq!(at(0xfed0_0900), Err(Refusal::Apic(0xfed0_0900)));
        assert_eq!(at(0xfee0_0800), Err(Refusal::Apic(0xfee0_0800)));
    }

    #[test]
    fn init_goes_to_all_others_and_gets_its_time() {
        let m = Machine { busy: Cell::new(5), ..Machine::default() };
        assert_eq!(park_others(Some(&m), &m, &m), Ok(()));
        assert_eq!(*m.sent.borrow(), [(0x310, 0), (0x300, 0xc4500)]);
        assert_eq!(m.busy.get(), 0);
        assert!(m.time.get() >= SETTLE_US);

        let m = Machine::default();
        assert_eq!(park_others(None::<&Machine>, &m, &m), Ok(()));
        assert_eq!(*m.sent.borrow(), [(0x830, 0xc4500)]);
        assert!(m.time.get() >= SETTLE_US);
    }

    #[test]
    fn an_init_that_never_leaves_is_an_error() {
        let m = Machine { busy: Cell::new(u32::MAX), ..Machine::default() };
        assert_eq!(park_others(Some(&m), &m, &m), Err(TimedOut));
    }
}
