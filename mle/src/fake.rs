//! A virtual CPU for tests.

use hv::vcpu::{Control, Exception, Gprs, Vcpu};

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
}
