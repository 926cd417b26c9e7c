//! A virtual CPU and memory for tests.

use core::cell::RefCell;

use hv::io::PhysMem;
use hv::vcpu::{Control, Exception, Exit, Gprs, Step, Vcpu};

/// Registers and what was done to them.
pub struct FakeVcpu {
    pub gprs: Gprs,
    pub rip: u64,
    pub control: Control,
    pub cpl: u8,
    pub injected: Option<Exception>,
    pub tsc_offset: u64,
    pub flushes: u32,
}

impl Default for FakeVcpu {
    fn default() -> Self {
        Self {
            gprs: Gprs::default(),
            rip: 0x1000,
            control: Control { cr0: 0x31, cr3: 0, cr4: 0x20, efer: 0x1500 },
            cpl: 0,
            injected: None,
            tsc_offset: 0,
            flushes: 0,
        }
    }
}

impl Vcpu for FakeVcpu {
    fn gprs(&self) -> &Gprs {
        &self.gprs
    }
    fn gprs_mut(&mut self) -> &mut Gprs {
        &mut self.gprs
    }
    fn rip(&self) -> u64 {
        self.rip
    }
    fn advance(&mut self, length: u64) {
        self.rip += length;
    }
    fn begin_step(&mut self) {}
    fn end_step(&mut self, _: Exit) -> Option<Step> {
        None
    }
    fn control(&self) -> Control {
        self.control
    }
    fn set_efer(&mut self, efer: u64) {
        self.control.efer = efer;
    }
    fn cpl(&self) -> u8 {
        self.cpl
    }
    fn code(&self) -> (u64, bool) {
        (0, true)
    }
    fn inject(&mut self, exception: Exception) {
        assert_eq!(self.injected, None, "one event at a time");
        self.injected = Some(exception);
    }
    fn tsc_offset(&self) -> u64 {
        self.tsc_offset
    }
    fn set_tsc_offset(&mut self, offset: u64) {
        self.tsc_offset = offset;
    }
    fn flush_nested(&mut self) {
        self.flushes += 1;
    }
    fn skip_to(&mut self, rip: u64) {
        self.rip = rip;
    }
    fn takes_interrupts(&self) -> bool {
        true
    }
    fn start_at(&mut self, vector: u8) {
        self.rip = u64::from(vector) << 12;
    }
    fn start_long_mode(&mut self, rip: u64, _: u64, cr3: u64, _: (u64, u32)) {
        (self.rip, self.control.cr3) = (rip, cr3);
    }
}

/// RAM from address 0.
pub struct Ram(RefCell<Vec<u8>>);

impl Ram {
    pub fn new(size: usize) -> Self {
        Self(RefCell::new(vec![0; size]))
    }

    pub fn set(&self, at: u64, entry: u64) {
        assert!(self.write(at, &entry.to_le_bytes()));
    }
}

impl PhysMem for Ram {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        let at = addr as usize;
        self.0.borrow().get(at..at + out.len()).map(|b| out.copy_from_slice(b)).is_some()
    }
    fn write(&self, addr: u64, data: &[u8]) -> bool {
        let at = addr as usize;
        self.0.borrow_mut().get_mut(at..at + data.len()).map(|b| b.copy_from_slice(data)).is_some()
    }
}

/// The accesses of `Mmio` that a device like the APIC does not take.
macro_rules! registers_of_four_bytes {
    () => {
        fn read8(&self, _: u32) -> u8 {
            panic!("not a register of a byte")
        }
        fn read64(&self, _: u32) -> u64 {
            panic!("not a register of eight bytes")
        }
        fn write8(&self, _: u32, _: u8) {
            panic!("not a register of a byte")
        }
        fn write64(&self, _: u32, _: u64) {
            panic!("not a register of eight bytes")
        }
    };
}
pub(crate) use registers_of_four_bytes;
