//! The seams between logic and hardware. Images implement them on metal, tests on device models.

use zerocopy::IntoBytes;

use crate::addr::PAGE_SIZE;

/// A window of device registers. Offsets are bytes from the window's start, aligned to the access;
/// the implementation decides what happens outside the window (metal: it was mapped by its maker and
/// an offset outside reads as all ones; models: panic, so a test fails).
pub trait Mmio {
    /// Reads one byte.
    fn read8(&self, offset: u32) -> u8;
    /// Reads four bytes, little endian.
    fn read32(&self, offset: u32) -> u32;
    /// Reads eight bytes in one access.
    fn read64(&self, offset: u32) -> u64;
    /// Writes one byte.
    fn write8(&self, offset: u32, value: u8);
    /// Writes four bytes, little endian.
    fn write32(&self, offset: u32, value: u32);
    /// Writes eight bytes in one access.
    fn write64(&self, offset: u32, value: u64);
}

/// The x86 I/O port space.
pub trait PortIo {
    /// IN of one byte.
    fn in8(&self, port: u16) -> u8;
    /// IN of two bytes.
    fn in16(&self, port: u16) -> u16;
    /// IN of four bytes.
    fn in32(&self, port: u16) -> u32;
    /// OUT of one byte.
    fn out8(&self, port: u16, value: u8);
    /// OUT of two bytes.
    fn out16(&self, port: u16, value: u16);
    /// OUT of four bytes.
    fn out32(&self, port: u16, value: u32);
}

impl<T: PortIo> PortIo for &T {
    fn in8(&self, port: u16) -> u8 {
        (**self).in8(port)
    }
    fn in16(&self, port: u16) -> u16 {
        (**self).in16(port)
    }
    fn in32(&self, port: u16) -> u32 {
        (**self).in32(port)
    }
    fn out8(&self, port: u16, value: u8) {
        (**self).out8(port, value);
    }
    fn out16(&self, port: u16, value: u16) {
        (**self).out16(port, value);
    }
    fn out32(&self, port: u16, value: u32) {
        (**self).out32(port, value);
    }
}

/// Model-specific registers of the CPU that runs the call.
pub trait Msr {
    /// RDMSR. The caller knows from CPUID that the register exists; a #GP would be fatal.
    fn rdmsr(&self, index: u32) -> u64;
    /// WRMSR.
    fn wrmsr(&self, index: u32, value: u64);
}

/// Time for bounded waits: every poll of hardware has a deadline.
pub trait Clock {
    /// Microseconds since some fixed moment; never goes back.
    fn now_us(&self) -> u64;
    /// Called between two polls.
    fn relax(&self) {
        core::hint::spin_loop();
    }
}

impl<T: Clock> Clock for &T {
    fn now_us(&self) -> u64 {
        (**self).now_us()
    }
    fn relax(&self) {
        (**self).relax();
    }
}

/// The wait ran out of its budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimedOut;

/// Polls `done` until it holds or `budget_us` microseconds have passed; tests it at least once, and
/// once more after the deadline, so a stalled CPU does not turn a success into a timeout.
pub fn poll_until(
    clock: &impl Clock,
    budget_us: u64,
    mut done: impl FnMut() -> bool,
) -> Result<(), TimedOut> {
    let start = clock.now_us();
    loop {
        if done() {
            return Ok(());
        }
        if clock.now_us().saturating_sub(start) > budget_us {
            return if done() { Ok(()) } else { Err(TimedOut) };
        }
        clock.relax();
    }
}

/// Physical memory that somebody else may have written. Reads copy out (I2: copy, check, use the copy).
pub trait PhysMem {
    /// Copies `out.len()` bytes from `addr`; false when the range is not memory this reader may reach,
    /// and `out` is unchanged then.
    fn read(&self, addr: u64, out: &mut [u8]) -> bool;
    /// Copies `data` to `addr`; false, and nothing written, when it may not.
    fn write(&self, addr: u64, data: &[u8]) -> bool;
    /// Reads eight bytes at `addr`; `None` when they are not memory that this reader may reach.
    fn read64(&self, addr: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes).then_some(u64::from_le_bytes(bytes))
    }
    /// Copies eight bytes to `addr`, a multiple of 8, in one access where hardware may be reading them.
    fn write64(&self, addr: u64, value: u64) -> bool {
        self.write(addr, &value.to_le_bytes())
    }
    /// Whether the page at `addr` is all zeros; `None` when it is not memory that this reader may reach.
    fn is_zero_page(&self, addr: u64) -> Option<bool> {
        let mut page = [0_u64; PAGE_SIZE as usize / 8];
        self.read(addr, page.as_mut_bytes()).then(|| page.iter().all(|word| *word == 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;

    struct Steps(Cell<u64>);
    impl Clock for Steps {
        fn now_us(&self) -> u64 {
            self.0.set(self.0.get() + 10);
            self.0.get()
        }
    }

    #[test]
    fn a_wait_ends_by_its_budget() {
        let mut polls = 0;
        let r = poll_until(&Steps(Cell::new(0)), 100, || {
            polls += 1;
            false
        });
        assert_eq!(r, Err(TimedOut));
        assert!((10..20).contains(&polls));
    }

    #[test]
    fn success_on_the_first_look_needs_no_time() {
        assert_eq!(poll_until(&Steps(Cell::new(0)), 0, || true), Ok(()));
    }
}
