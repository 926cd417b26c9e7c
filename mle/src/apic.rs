//! The local APIC, as far as the MLE drives it: finding it, and sending IPIs to start and wake APs.

use core::ops::RangeInclusive;

use hv::io::{Clock, Mmio, Msr, TimedOut, poll_until};

/// Where the xAPIC page is; a loader that moved it is refused.
pub const XAPIC_BASE: u64 = 0xfee0_0000;
/// APIC_BASE bit: x2APIC mode.
pub const X2APIC_ENABLED: u64 = 1 << 10;

/// Interrupt command register, low half.
pub const ICR_LOW: u32 = 0x300;
/// Interrupt command register, high half: destination in bits 31:24.
pub const ICR_HIGH: u32 = 0x310;
const ID: u32 = 0x20;
const SPURIOUS: u32 = 0xf0;
const TASK_PRIORITY: u32 = 0x80;
const DELIVERY_PENDING: u32 = 1 << 12;
/// Longest wait for an IPI to leave, in microseconds.
const SEND_BUDGET_US: u64 = 100_000;

/// Delivery modes of an interrupt command. Spec: \[APM2\] "Interrupt Command Register".
pub mod delivery {
    /// SMI.
    pub const SMI: u32 = 0b010;
    /// NMI.
    pub const NMI: u32 = 0b100;
    /// INIT.
    pub const INIT: u32 = 0b101;
    /// Startup.
    pub const STARTUP: u32 = 0b110;
}

/// An interrupt command, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// The low half as written.
    pub low: u32,
    /// Destination APIC ID, where there is no shorthand.
    pub destination: u32,
}

impl Command {
    /// Delivery mode, see [`delivery`].
    pub fn mode(&self) -> u32 {
        self.low >> 8 & 7
    }
    /// Vector.
    pub fn vector(&self) -> u8 {
        self.low as u8
    }
    /// INIT level de-assert: a relic that starts nothing.
    pub fn is_deassert(&self) -> bool {
        self.mode() == delivery::INIT && self.low & (1 << 14) == 0 && self.low & (1 << 15) != 0
    }
    /// Whether the command goes to the CPU with APIC ID `id`, sent from `sender`. Logical destinations are not
    /// resolved: they reach nobody, as INIT and Startup are sent physically by every OS.
    pub fn reaches(&self, id: u32, sender: u32) -> bool {
        match self.low >> 18 & 3 {
            0 => self.low & (1 << 11) == 0 && (self.destination == id || self.destination == 0xff),
            1 => id == sender,
            2 => true,
            _ => id != sender,
        }
    }
}

/// The APIC of the running CPU in xAPIC mode.
pub struct Xapic<M>(pub M);

impl<M: Mmio> Xapic<M> {
    /// Whether `APIC_BASE` says xAPIC mode at the usual place.
    pub fn usable(msr: &impl Msr) -> bool {
        const ENABLED: u64 = 1 << 11;
        let base = msr.rdmsr(crate::guest::msr::APIC_BASE);
        base & 0xf_ffff_ffff_f000 == XAPIC_BASE && base & (ENABLED | X2APIC_ENABLED) == ENABLED
    }

    /// This CPU's APIC ID.
    pub fn id(&self) -> u32 {
        self.0.read32(ID) >> 24
    }

    /// Whether the APIC delivers interrupts (software enable).
    pub fn is_enabled(&self) -> bool {
        self.0.read32(SPURIOUS) & 1 << 8 != 0
    }

    /// As after INIT, but for what the MLE needs: interrupts of the top class are delivered.
    pub fn quiet(&self) {
        const END_OF_INTERRUPT: u32 = 0xb0;
        const IN_SERVICE: u32 = 0x100;
        const LOCAL_VECTORS: RangeInclusive<u32> = 0x320..=0x370;
        const MASKED: u32 = 1 << 16;
        const INITIAL_COUNT: u32 = 0x380;
        self.0.write32(SPURIOUS, 0x1ff);
        self.0.write32(TASK_PRIORITY, 0xe0);
        for vector in LOCAL_VECTORS.step_by(0x10) {
            self.0.write32(vector, MASKED);
        }
        self.0.write32(INITIAL_COUNT, 0);
        // Each ends one of the interrupts that the guest was in.
        for word in (IN_SERVICE..).step_by(0x10).take(8) {
            for _ in 0..self.0.read32(word).count_ones() {
                self.0.write32(END_OF_INTERRUPT, 0);
            }
        }
    }

    /// Holds back all but the top class, also where the APIC is off. Gives what [`Xapic::release`] takes.
    pub fn hold(&self) -> [u32; 2] {
        let before = [self.0.read32(SPURIOUS), self.0.read32(TASK_PRIORITY)];
        self.0.write32(TASK_PRIORITY, 0xe0);
        self.0.write32(SPURIOUS, before[0] | 1 << 8);
        before
    }

    /// Ends that.
    pub fn release(&self, [spurious, priority]: &[u32; 2]) {
        self.0.write32(SPURIOUS, *spurious);
        self.0.write32(TASK_PRIORITY, *priority);
    }

    /// Sends interrupts to this CPU: `vectors` has a bit for each from `first` on.
    pub fn send_to_self(&self, first: u32, vectors: u32) {
        const SELF: u32 = 1 << 18;
        for bit in (0..32).filter(|bit| vectors & 1 << bit != 0) {
            self.0.write32(ICR_LOW, SELF | first.wrapping_add(bit));
        }
    }

    /// Turns delivery off, as after reset: the guest enables its own.
    pub fn disable(&self) {
        self.0.write32(TASK_PRIORITY, 0);
        self.0.write32(SPURIOUS, 0xff);
    }

    /// Sends a command and waits until it has left.
    pub fn send(&self, clock: &impl Clock, low: u32, destination: u32) -> Result<(), TimedOut> {
        self.0.write32(ICR_HIGH, destination << 24);
        self.0.write32(ICR_LOW, low);
        poll_until(clock, SEND_BUDGET_US, || self.0.read32(ICR_LOW) & DELIVERY_PENDING == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_start_sequence_is_understood() {
        // INIT assert, INIT de-assert, Startup with vector 9Ah, to APIC 1.
        let c = |low| Command { low, destination: 1 };
        assert_eq!(c(0xc500).mode(), delivery::INIT);
        assert!(!c(0xc500).is_deassert() && c(0x8500).is_deassert());
        assert_eq!((c(0x69a).mode(), c(0x69a).vector()), (delivery::STARTUP, 0x9a));
        assert!(c(0x69a).reaches(1, 0) && !c(0x69a).reaches(2, 0));
        let all_but_self = Command { low: 0xc4500, destination: 0 };
        assert!(all_but_self.reaches(3, 0) && !all_but_self.reaches(0, 0));
    }
}
