//! The hardware edge shared by both images: ports, MSRs, register windows, physical memory, time, serial line.
//!
//! UNSAFETY: everything here is an instruction or a volatile access that the compiler cannot check. Types are
//! made once, by `unsafe` constructors that say what their maker must know; their methods are safe.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::fmt;

use hv::io::{Clock, Mmio, Msr, PhysMem, PortIo};

/// The I/O ports of this machine.
#[derive(Clone, Copy)]
pub struct Ports(());

impl Ports {
    /// # Safety
    /// The caller runs at CPL 0 on bare metal (not in a host process).
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

macro_rules! port_access {
    ($($read:ident $write:ident $ty:ty, $inx:path, $outx:path;)*) => {$(
        fn $read(&self, port: u16) -> $ty {
            // SAFETY: `Ports::new`: CPL 0; an IN moves no memory of ours.
            unsafe { $inx(port) }
        }
        fn $write(&self, port: u16, value: $ty) {
            // SAFETY: `Ports::new`: CPL 0. What a device does on an OUT is the caller's logic; DMA it may start
            // is behind the IOMMU.
            unsafe { $outx(port, value) }
        }
    )*};
}

impl PortIo for Ports {
    port_access! {
        in8 out8 u8, x86::io::inb, x86::io::outb;
        in16 out16 u16, x86::io::inw, x86::io::outw;
        in32 out32 u32, x86::io::inl, x86::io::outl;
    }
}

/// The MSRs of this CPU.
#[derive(Clone, Copy)]
pub struct Msrs(());

impl Msrs {
    /// # Safety
    /// The caller runs at CPL 0 on bare metal, and hands out the value only to logic that keeps the MSRs it
    /// writes consistent with the running code (no EFER.LME flip under our feet).
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

impl Msr for Msrs {
    fn rdmsr(&self, index: u32) -> u64 {
        // SAFETY: `Msrs::new`: CPL 0; the trait's contract: the register exists.
        unsafe { x86::msr::rdmsr(index) }
    }
    fn wrmsr(&self, index: u32, value: u64) {
        // SAFETY: as above; effects on the running code are the maker's promise.
        unsafe { x86::msr::wrmsr(index, value) }
    }
}

/// A window of device registers at a physical address that is mapped one to one.
#[derive(Clone, Copy)]
pub struct PhysWindow {
    base: u64,
    len: u32,
}

impl PhysWindow {
    /// # Safety
    /// `base..base+len` is mapped one to one for as long as the value lives, holds device registers, and no
    /// Rust reference to it exists.
    pub const unsafe fn new(base: u64, len: u32) -> Self {
        Self { base, len }
    }

    /// The address of an aligned access of `size` bytes; `None` outside the window.
    #[inline(always)]
    fn at(&self, offset: u32, size: u32) -> Option<u64> {
        (offset.checked_add(size)? <= self.len && offset.is_multiple_of(size))
            .then(|| self.base.wrapping_add(offset.into()))
    }
}

macro_rules! mmio_access {
    ($($read:ident $write:ident $ty:ty;)*) => {$(
        fn $read(&self, offset: u32) -> $ty {
            match self.at(offset, size_of::<$ty>() as u32) {
                // SAFETY: `PhysWindow::new`: mapped and ours to access; `at` checked bounds and alignment.
                Some(addr) => unsafe { (addr as *const $ty).read_volatile() },
                None => <$ty>::MAX,
            }
        }
        fn $write(&self, offset: u32, value: $ty) {
            if let Some(addr) = self.at(offset, size_of::<$ty>() as u32) {
                // SAFETY: as for reads.
                unsafe { (addr as *mut $ty).write_volatile(value) }
            }
        }
    )*};
}

impl Mmio for PhysWindow {
    mmio_access! {
        read8 write8 u8;
        read32 write32 u32;
        read64 write64 u64;
    }
}

/// Physical memory below a limit, mapped one to one; what somebody else wrote is copied out byte by byte.
#[derive(Clone, Copy)]
pub struct Identity {
    limit: u64,
    /// Our own memory, which no write through this type may touch.
    own: (u64, u64),
}

impl Identity {
    /// # Safety
    /// `0..limit` is mapped one to one, readable and, outside `own` (start, length), writable for as long as
    /// the value lives; every Rust object of the running image lies inside `own`.
    pub const unsafe fn new(limit: u64, own: (u64, u64)) -> Self {
        Self { limit, own }
    }

    /// Whether `addr..addr+len` is below the limit and off page 0 (a null pointer is no address).
    fn mapped(&self, addr: u64, len: usize) -> bool {
        addr >= hv::addr::PAGE_SIZE && addr.checked_add(len as u64).is_some_and(|end| end <= self.limit)
    }

    /// Whether it is, and outside of our own memory.
    fn writable(&self, addr: u64, len: usize) -> bool {
        let own_end = self.own.0.saturating_add(self.own.1);
        self.mapped(addr, len) && (addr >= own_end || self.own.0 >= addr.saturating_add(len as u64))
    }
}

impl PhysMem for Identity {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        if !self.mapped(addr, out.len()) {
            return false;
        }
        // SAFETY: `Identity::new`: the range is mapped and readable; a raw copy makes no reference to memory that
        // others may write, and `out` is an exclusive borrow, so the two can overlap only if the caller reads its
        // own buffer, which `copy` allows.
        unsafe { core::ptr::copy(addr as *const u8, out.as_mut_ptr(), out.len()) };
        true
    }
    fn write(&self, addr: u64, data: &[u8]) -> bool {
        if !self.writable(addr, data.len()) {
            return false;
        }
        // SAFETY: mapped and writable (`Identity::new`), and clear of every Rust object of this image.
        unsafe { core::ptr::copy(data.as_ptr(), addr as *mut u8, data.len()) };
        true
    }
    fn read64(&self, addr: u64) -> Option<u64> {
        // SAFETY: mapped and readable (`Identity::new`); no reference is made to memory that others may write.
        self.mapped(addr, 8).then(|| unsafe { (addr as *const u64).read_unaligned() })
    }
    fn write64(&self, addr: u64, value: u64) -> bool {
        let right = addr.is_multiple_of(8) && self.writable(addr, 8);
        if right {
            // SAFETY: as of `write`, and aligned.
            unsafe { (addr as *mut u64).write_volatile(value) };
        }
        right
    }
    // By words and without a copy: a digest of all memory looks at pages that nobody ever used, most of all.
    fn is_zero_page(&self, addr: u64) -> Option<bool> {
        if !addr.is_multiple_of(hv::addr::PAGE_SIZE) || !self.mapped(addr, hv::addr::PAGE_SIZE as usize) {
            return None;
        }
        let mut page = (addr..=addr | hv::addr::PAGE_SIZE.saturating_sub(1)).step_by(64);
        // SAFETY: the page is mapped and readable (`Identity::new`), and each word is aligned and within it. Volatile, and no
        // reference: others may write there.
        let word = |at: u64| unsafe { (at as *const u64).read_volatile() };
        let line = |at: u64| {
            word(at)
                | word(at | 8)
                | word(at | 16)
                | word(at | 24)
                | word(at | 32)
                | word(at | 40)
                | word(at | 48)
                | word(at | 56)
        };
        Some(page.all(|at| line(at) == 0))
    }
}

/// The time-stamp counter as a clock.
#[derive(Clone, Copy)]
pub struct TscClock {
    /// Ticks per millisecond.
    pub khz: u64,
}

impl Clock for TscClock {
    fn now_us(&self) -> u64 {
        // SAFETY: RDTSC reads a counter; CR4.TSD does not bind CPL 0.
        let ticks = unsafe { x86::time::rdtsc() };
        // In two steps, because 64 bits do not hold ticks * 1000 for long.
        let (ms, rest) = match (ticks.checked_div(self.khz), ticks.checked_rem(self.khz)) {
            (Some(ms), Some(rest)) => (ms, rest),
            _ => return 0,
        };
        let us = rest.saturating_mul(1000).checked_div(self.khz).unwrap_or(0);
        ms.saturating_mul(1000).saturating_add(us)
    }
}

/// The first serial port, polled. It was set up by firmware; we only send.
pub struct Serial<P>(pub P);

/// COM1's base port.
pub const COM1: u16 = 0x3f8;

impl<P: PortIo> Serial<P> {
    /// Sends one byte; gives up on a transmitter that stays busy, a log line is never worth a hang.
    pub fn byte(&self, byte: u8) {
        const LSR: u16 = COM1 + 5;
        const THR_EMPTY: u8 = 1 << 5;
        for _ in 0..100_000 {
            if self.0.in8(LSR) & THR_EMPTY != 0 {
                self.0.out8(COM1, byte);
                return;
            }
        }
    }

    /// Sends text, with carriage returns for terminals.
    pub fn text(&self, text: &str) {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.byte(b'\r');
            }
            self.byte(byte);
        }
    }
}

impl<P: PortIo> fmt::Write for Serial<P> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        self.text(s);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_zeros_is_told_from_one_with_a_bit() {
        #[repr(align(4096))]
        struct Page([u8; 4096]);
        let mut page = Box::new(Page([0; 4096]));
        // SAFETY: of all that this lets one read, the test reads its own page.
        let mem = unsafe { Identity::new(u64::MAX, (0, 0)) };
        let at = page.0.as_ptr() as u64;
        for byte in 0..4096 {
            page.0[byte] = 1 << (byte % 8);
            assert_eq!(mem.is_zero_page(at), Some(false), "{byte}");
            page.0[byte] = 0;
        }
        assert_eq!(mem.is_zero_page(at), Some(true));
        assert_eq!(mem.is_zero_page(at + 8), None);
        assert_eq!(mem.is_zero_page(0), None);
    }
}
