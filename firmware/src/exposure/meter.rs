//! How much goes on record of what devices, the guest or firmware choose the number of: there can be more in a second than any log has
//! room for.

/// Counts all events of a sort and says which of them to tell: [`Meter::BURST`] at once, then one for each
/// [`Meter::PERIOD_US`] that passed.
#[derive(Clone, Copy, Debug)]
pub struct Meter {
    seen: u64,
    silent: u64,
    left: u32,
    /// Up to when time was turned into events that may be told.
    at_us: u64,
}

impl Meter {
    /// Most events told in a row.
    pub const BURST: u32 = 16;
    /// Microseconds that earn one more.
    pub const PERIOD_US: u64 = 1_000_000;

    /// Nothing seen yet.
    pub const fn new() -> Self {
        Self { seen: 0, silent: 0, left: Self::BURST, at_us: 0 }
    }

    /// Counts an event. With `Some(n)` it is to be told, and that `n` were not since the last that was.
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

    /// Counts an event that is not to be told: it says nothing new.
    pub fn pass_over(&mut self) {
        self.seen = self.seen.saturating_add(1);
        self.silent = self.silent.saturating_add(1);
    }

    /// Events counted so far.
    pub const fn seen(&self) -> u64 {
        self.seen
    }

    /// Events since the last that was told.
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
        fn no_event_is_forgotten(times in prop::collection::vec(any::<u64>(), 0..200)) {
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
