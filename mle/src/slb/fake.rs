//! Memory, ports and MSRs for the tests of this stage.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use hv::io::{Msr, PhysMem, PortIo};

/// One piece of memory; nothing else can be read or written.
pub struct Memory {
    base: u64,
    bytes: RefCell<Vec<u8>>,
}

impl Memory {
    pub fn with(base: u64, bytes: &[u8]) -> Self {
        Self { base, bytes: RefCell::new(bytes.to_vec()) }
    }

    fn at(&self, addr: u64, len: usize) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(addr.checked_sub(self.base)?).ok()?;
        let end = start.checked_add(len)?;
        (end <= self.bytes.borrow().len()).then_some(start..end)
    }
}

impl PhysMem for Memory {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        let Some(range) = self.at(addr, out.len()) else { return false };
        out.copy_from_slice(&self.bytes.borrow()[range]);
        true
    }
    fn write(&self, addr: u64, data: &[u8]) -> bool {
        let Some(range) = self.at(addr, data.len()) else { return false };
        self.bytes.borrow_mut()[range].copy_from_slice(data);
        true
    }
}

/// MSRs with the values given, the local APIC at its reset address, the rest zero.
pub struct Msrs(pub HashMap<u32, u64>);

impl Msrs {
    pub fn with(values: &[(u32, u64)]) -> Self {
        let mut all = HashMap::from([(0x1b, 0xfee0_0900)]);
        all.extend(values.iter().copied());
        Self(all)
    }
}

impl Msr for Msrs {
    fn rdmsr(&self, index: u32) -> u64 {
        self.0.get(&index).copied().unwrap_or(0)
    }
    fn wrmsr(&self, index: u32, _: u64) {
        panic!("write of MSR {index:#x}");
    }
}

/// Ports: a serial line, an interval timer, the RTC's RAM; the rest is written down.
#[derive(Default)]
pub struct Ports {
    /// OUTs in order, but those of the serial line and of the delay port.
    pub written: RefCell<Vec<(u16, u8)>>,
    /// What went out on the serial line.
    pub serial: RefCell<String>,
    cmos: RefCell<HashMap<u8, u8>>,
    cmos_index: Cell<u8>,
    /// Port reads until the timer's output rises; 0: never.
    pub timer: Cell<u32>,
    left: Cell<u32>,
    /// Ticks of the time-stamp counter, which each port access moves on by `ticks_per_access`.
    pub ticks: Cell<u64>,
    pub ticks_per_access: Cell<u64>,
}

impl Ports {
    fn access(&self) {
        self.ticks.set(self.ticks.get() + self.ticks_per_access.get());
    }
}

impl PortIo for Ports {
    fn in8(&self, port: u16) -> u8 {
        self.access();
        match port {
            0x61 => {
                let left = self.left.get();
                self.left.set(left.saturating_sub(1));
                if left == 1 { 0x21 } else { 1 }
            }
            0x71 => self.cmos.borrow().get(&self.cmos_index.get()).copied().unwrap_or(0xff),
            0x3fd => 1 << 5,
            _ => panic!("IN from {port:#x}"),
        }
    }
    fn out8(&self, port: u16, value: u8) {
        self.access();
        match port {
            0x3f8 => self.serial.borrow_mut().push(value.into()),
            0x80 => {}
            0x70 => self.cmos_index.set(value),
            0x71 => {
                self.cmos.borrow_mut().insert(self.cmos_index.get(), value);
                self.written.borrow_mut().push((port, value));
            }
            0x42 => self.left.set(self.timer.get()),
            _ => self.written.borrow_mut().push((port, value)),
        }
    }
    fn in16(&self, port: u16) -> u16 {
        panic!("IN from {port:#x}");
    }
    fn in32(&self, port: u16) -> u32 {
        panic!("IN from {port:#x}");
    }
    fn out16(&self, port: u16, _: u16) {
        panic!("OUT to {port:#x}");
    }
    fn out32(&self, port: u16, _: u32) {
        panic!("OUT to {port:#x}");
    }
}
