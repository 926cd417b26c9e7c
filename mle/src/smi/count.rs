//! SMIs that are no exits, where the CPU counts them: VMX cannot intercept them, and MSR 34h tells how many there were.

use core::sync::atomic::{AtomicU32, Ordering};

use firmware::exposure::{Kind, Record, Text};
use spin::Mutex;

use crate::exposure::told;
use crate::metal::TscClock;
use crate::smp::MAX_CPUS;
use crate::{exposure, smi};

/// SMIs that were raised for firmware or the guest: the chipset sends each to all CPUs.
static ASKED: AtomicU32 = AtomicU32::new(0);
/// What is known of each CPU's count.
static SEEN: [Mutex<Seen>; MAX_CPUS] = [const { Mutex::new(Seen(None)) }; MAX_CPUS];

/// By how many, at most, a CPU's count was ahead of those that were asked for. None before it was first read.
struct Seen(Option<u32>);

impl Seen {
    /// SMIs that came since the last time and that nobody is known to have asked for. A CPU that takes one later than another
    /// is behind for a while; what it is behind for good hides as many.
    fn unasked(&mut self, count: u32, asked: u32) -> u32 {
        let ahead = count.wrapping_sub(asked);
        let most = self.0.get_or_insert(ahead);
        let more = ahead.wrapping_sub(*most);
        if more.cast_signed() <= 0 {
            return 0;
        }
        *most = ahead;
        more
    }
}

/// An SMI is about to be raised.
pub fn asked() {
    ASKED.fetch_add(1, Ordering::Relaxed);
}

/// Takes note of what the CPU at `index` counted, at each of its exits: SMIs that nobody asked for go on record, and
/// somebody looks for damage.
pub fn see(index: usize, count: u32, id: impl FnOnce() -> u32, clock: &TscClock) {
    let Some(seen) = SEEN.get(index) else { return };
    let more = seen.lock().unasked(count, ASKED.load(Ordering::Relaxed));
    if more == 0 {
        return;
    }
    smi::owe_look();
    let text = Some(Text::new(format_args!("{more} by the CPU's count")));
    told::UNASKED_SMIS.record(Record { text, ..Record::new(Kind::SMI, id(), exposure::now_us(clock)) });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_were_asked_for_do_not_count_whenever_they_come() {
        let mut seen = Seen(None);
        assert_eq!(seen.unasked(70, 3), 0, "those before the launch");
        assert_eq!(seen.unasked(71, 3), 1);
        // Asked for, and not yet taken by this CPU; then taken.
        assert_eq!(seen.unasked(71, 4), 0);
        assert_eq!(seen.unasked(72, 4), 0);
        // Three, of which one was asked for.
        assert_eq!(seen.unasked(75, 5), 2);
        assert_eq!(seen.unasked(75, 5), 0);
    }

    #[test]
    fn a_counter_that_begins_again_goes_on() {
        let mut seen = Seen(None);
        assert_eq!(seen.unasked(u32::MAX, 0), 0);
        assert_eq!(seen.unasked(1, 0), 2);
    }
}
