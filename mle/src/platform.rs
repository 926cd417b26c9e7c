//! The machine as the DMA protection sees it: ports, time, memory, register windows, chance.

use hv::addr::PhysRange;
use hv::io::{Clock, PhysMem, PortIo};
use iommu::Platform;
use iommu::vt_d::WriteBack;

use crate::metal::{Identity, PhysWindow, Ports, TscClock};

/// The bare machine.
#[derive(Clone, Copy)]
pub struct Machine {
    /// Ports.
    pub ports: Ports,
    /// Time.
    pub clock: TscClock,
    /// Memory that may be read and written.
    pub mem: Identity,
    /// First address that is not mapped.
    pub mapped: u64,
}

impl PortIo for Machine {
    fn in8(&self, port: u16) -> u8 {
        self.ports.in8(port)
    }
    fn in16(&self, port: u16) -> u16 {
        self.ports.in16(port)
    }
    fn in32(&self, port: u16) -> u32 {
        self.ports.in32(port)
    }
    fn out8(&self, port: u16, value: u8) {
        self.ports.out8(port, value);
    }
    fn out16(&self, port: u16, value: u16) {
        self.ports.out16(port, value);
    }
    fn out32(&self, port: u16, value: u32) {
        self.ports.out32(port, value);
    }
}

impl Clock for Machine {
    fn now_us(&self) -> u64 {
        self.clock.now_us()
    }
}

impl PhysMem for Machine {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        self.mem.read(addr, out)
    }
    fn write(&self, addr: u64, data: &[u8]) -> bool {
        self.mem.write(addr, data)
    }
    fn write64(&self, addr: u64, value: u64) -> bool {
        self.mem.write64(addr, value)
    }
}

impl Platform for Machine {
    type Window = PhysWindow;

    #[expect(unsafe_code, reason = "makes a register window")]
    fn map(&self, base: u64, len: u32) -> Option<PhysWindow> {
        let end = base.checked_add(len.into())?;
        // SAFETY: below `mapped` everything is mapped one to one for as long as the image runs; the caller names
        // register windows only, where no Rust object can be.
        (end <= self.mapped).then(|| unsafe { PhysWindow::new(base, len) })
    }

    fn random(&self) -> u64 {
        let mut value = 0;
        let has_rdrand = raw_cpuid::CpuId::new().get_feature_info().is_some_and(|f| f.has_rdrand());
        if has_rdrand {
            // A failed RDRAND leaves the time-stamp counter alone to choose.
            // SAFETY: the CPU has the instruction.
            #[expect(unsafe_code, reason = "RDRAND")]
            let _ = unsafe { x86::random::rdrand64(&mut value) };
        }
        // SAFETY: RDTSC reads a counter.
        #[expect(unsafe_code, reason = "RDTSC")]
        let tsc = unsafe { x86::time::rdtsc() };
        value ^ tsc.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

impl WriteBack for Machine {
    #[expect(unsafe_code, reason = "CLFLUSH")]
    fn write_back(&self, range: PhysRange) {
        if range.start() < hv::addr::PAGE_SIZE || range.last() >= self.mapped {
            return;
        }
        let line = raw_cpuid::CpuId::new().get_feature_info().map_or(0, |f| f.cflush_cache_line_size());
        let line = usize::from(line).saturating_mul(8).max(1);
        let first = range.start() & (line as u64).wrapping_neg();
        // SAFETY: the range is mapped (checked above); the instruction changes no byte of it. The fence holds what follows, a
        // write to the register that has an IOMMU read the memory.
        unsafe {
            for at in (first..=range.last()).step_by(line) {
                core::arch::x86_64::_mm_clflush(at as *const u8);
            }
            core::arch::x86_64::_mm_mfence();
        }
    }
}
