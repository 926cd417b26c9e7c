//! What IOMMUs stopped, in words that both vendors share, and how much of it is told: a device can be denied more
//! often in a second than any log has room for.

/// How a device tried to reach the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Read,
    /// Write.
    Write,
    /// The IOMMU does not say.
    Unknown,
}

/// Why a request was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The tables give the device no such right there.
    Denied,
    /// It was an interrupt, of a kind that the device may not send.
    Interrupt,
    /// The IOMMU could not read, or does not accept, a table entry or command: a defect of ours or of the hardware.
    /// The value is the vendor's code.
    Broken(u8),
}

/// One request that an IOMMU stopped, or a failure of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Who: PCI segment in bits 31:16, bus in 15:8, device in 7:3, function in 2:0.
    pub source: u32,
    /// Where: the device's address; the IOMMU's own for some of [`Reason::Broken`].
    pub address: u64,
    /// How.
    pub access: Access,
    /// Why.
    pub reason: Reason,
}

/// What one look into the IOMMUs' logs found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Faults taken out.
    pub events: u32,
    /// Whether some log ran over: faults were lost, nobody knows how many.
    pub overflowed: bool,
    /// Whether some log holds more.
    pub more: bool,
}

impl Drained {
    pub(crate) fn add(&mut self, other: Self) {
        self.events = self.events.saturating_add(other.events);
        self.overflowed |= other.overflowed;
        self.more |= other.more;
    }
}

/// Counts all faults and says which of them to tell: [`Meter::BURST`] at once, then one for each
/// [`Meter::PERIOD_US`] that passed.
#[derive(Clone, Copy, Debug)]
pub struct Meter {
    seen: u64,
    silent: u64,
    left: u32,
    /// Up to when time was turned into faults that may be told.
    at_us: u64,
}

impl Meter {
    /// Most faults told in a row.
    pub const BURST: u32 = 16;
    /// Microseconds that earn one more.
    pub const PERIOD_US: u64 = 1_000_000;

    /// Nothing seen yet.
    pub const fn new() -> Self {
        Self { seen: 0, silent: 0, left: Self::BURST, at_us: 0 }
    }

    /// Counts a fault. With `Some(n)` it is to be told, and that `n` were not since the last that was.
    pub fn admit(&mut self, now_us: u64) -> Option<u64> {
        let periods = now_us.saturating_sub(self.at_us) / Self::PERIOD_US;
        let earned = u32::try_from(periods).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(earned).min(Self::BURST);
        self.at_us = self.at_us.saturating_add(periods.saturating_mul(Self::PERIOD_US));
        let Some(left) = self.left.checked_sub(1) else {
            self.pass_over();
            return None;
        };
        self.left = left;
        self.seen = self.seen.saturating_add(1);
        Some(core::mem::take(&mut self.silent))
    }

    /// Counts a fault that is not to be told: it says nothing new.
    pub fn pass_over(&mut self) {
        self.seen = self.seen.saturating_add(1);
        self.silent = self.silent.saturating_add(1);
    }

    /// Faults counted so far.
    pub const fn seen(&self) -> u64 {
        self.seen
    }

    /// Faults since the last that was told.
    pub const fn silent(&self) -> u64 {
        self.silent
    }
}

impl Default for Meter {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_storm_is_counted_and_told_in_part() {
        let mut meter = Meter::new();
        let told = (0..999).filter(|_| meter.admit(5).is_some()).count();
        meter.pass_over();
        assert_eq!((told, meter.seen(), meter.silent()), (16, 1000, 984));
        assert_eq!(meter.admit(Meter::PERIOD_US - 1), None);
        assert_eq!(meter.admit(Meter::PERIOD_US), Some(985));
        assert_eq!(meter.admit(Meter::PERIOD_US), None);
        // A quiet time earns no more than the burst.
        let later = 1000 * Meter::PERIOD_US;
        assert_eq!((0..100).filter(|_| meter.admit(later).is_some()).count(), 16);
    }

    proptest! {
        #[test]
        fn no_fault_is_forgotten(times in prop::collection::vec(any::<u64>(), 0..200)) {
            let mut meter = Meter::new();
            let mut accounted = 0;
            for time in &times {
                accounted += meter.admit(*time).map_or(0, |silent| silent + 1);
            }
            prop_assert_eq!(accounted + meter.silent(), times.len() as u64);
            prop_assert_eq!(meter.seen(), times.len() as u64);
        }
    }
}
