//! Frequency of the time-stamp counter, by channel 2 of the interval timer.

use hv::failure::SlbError;
use hv::io::PortIo;

use super::{Failure, fail};

/// Frequency of the interval timer, Hz.
const PIT_HZ: u64 = 1_193_182;
const PIT_CHANNEL2: u16 = 0x42;
const PIT_COMMAND: u16 = 0x43;
/// Channel 2, low then high byte, mode 0: the output rises when the count has run out.
const CHANNEL2_ONE_SHOT: u8 = 0b1011_0000;
/// Bit 0 gates channel 2, bit 1 lets it reach the loudspeaker, bit 5 is its output.
const CONTROL_PORT: u16 = 0x61;
const GATE: u8 = 1;
const SPEAKER: u8 = 1 << 1;
const OUTPUT: u8 = 1 << 5;
/// 10 ms, in timer ticks.
const COUNT: u16 = 11_932;
/// By a thousand: the result is in kHz, [`PIT_HZ`] in Hz.
const TICKS_1000: u64 = COUNT as u64 * 1000;
const ROUNDS: usize = 3;
/// Port reads after which the timer is given up: an IN takes 100 ns at the very least, so 100 ms.
const POLLS: u32 = 1_000_000;
/// What a counter's frequency can be, kHz. Below a tick per microsecond, limits would be rounded to nothing.
const SANE_KHZ: core::ops::RangeInclusive<u64> = 1000..=20_000_000;

/// Measures the counter that `ticks` reads; kHz.
///
/// The counter is read before the timer starts and after its end was seen, so that a delay can only lengthen
/// a round, and the shortest of several rounds is the best.
pub fn tsc_khz(ports: &impl PortIo, ticks: impl Fn() -> u64) -> Result<u64, Failure> {
    let mut best = u64::MAX;
    for _ in 0..ROUNDS {
        best = best.min(round(ports, &ticks).map_or(u64::MAX, |ticks| ticks));
    }
    let khz = best.saturating_mul(PIT_HZ).wrapping_div(TICKS_1000);
    if SANE_KHZ.contains(&khz) { Ok(khz) } else { fail(SlbError::Timer, khz.wrapping_div(1000)) }
}

fn round(ports: &impl PortIo, ticks: &impl Fn() -> u64) -> Option<u64> {
    let [low, high] = COUNT.to_le_bytes();
    ports.out8(CONTROL_PORT, ports.in8(CONTROL_PORT) & !SPEAKER | GATE);
    ports.out8(PIT_COMMAND, CHANNEL2_ONE_SHOT);
    ports.out8(PIT_CHANNEL2, low);
    let start = ticks();
    ports.out8(PIT_CHANNEL2, high);
    (0..POLLS).find(|_| ports.in8(CONTROL_PORT) & OUTPUT != 0)?;
    Some(ticks().wrapping_sub(start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slb::fake::Ports;

    /// Runs against a timer that takes `polls` port reads, with `ticks` of the counter for each access.
    fn measure(polls: u32, ticks: u64) -> Result<u64, Failure> {
        let ports = Ports::default();
        ports.timer.set(polls);
        ports.ticks_per_access.set(ticks);
        tsc_khz(&ports, || ports.ticks.get())
    }

    #[test]
    fn ten_milliseconds_of_ticks_give_the_frequency() {
        // 10000 reads in 10 ms, 3000 ticks each: 3 GHz.
        let khz = measure(10_000, 3000).unwrap();
        assert!((2_995_000..3_005_000).contains(&khz), "{khz}");
    }

    #[test]
    fn a_dead_timer_ends_the_launch_in_bounded_time() {
        assert_eq!(measure(0, 3000).unwrap_err().error, SlbError::Timer);
    }

    #[test]
    fn absurd_frequencies_are_refused() {
        // 100 reads in 10 ms, 90 ticks each: 900 kHz.
        assert_eq!(measure(100, 90).unwrap_err(), Failure { error: SlbError::Timer, detail: 0 });
        assert_eq!(measure(10_000, 0).unwrap_err().error, SlbError::Timer);
        assert_eq!(measure(10_000, 10_000_000).unwrap_err().error, SlbError::Timer);
    }
}
