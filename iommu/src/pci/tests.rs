use core::cell::{Cell, RefCell};

use super::*;
use crate::model::Machine;

#[test]
fn finds_every_function_that_answers() {
    let machine = Machine::new();
    for id in [0x0000, 0x0007, 0x00ff, 0xffff] {
        machine.set_config(id, 0, 0x1234_1022);
    }
    // No function 0: hidden from who looks there first.
    machine.set_config(0x1203, 0, 0x1234_1022);
    let found: Vec<u16> = functions(&machine).map(|function| function.id).collect();
    assert_eq!(found, [0x0000, 0x0007, 0x00ff, 0x1203, 0xffff]);
}

#[test]
fn a_looping_capability_list_ends() {
    let machine = Machine::new();
    let function = Function::new(&machine, 8);
    machine.set_config(8, 4, 1 << 20);
    machine.set_config(8, 0x34, 0x50);
    machine.set_config(8, 0x50, 0x6005);
    machine.set_config(8, 0x60, 0x5010);
    assert_eq!(function.capability(|header| header & 0xff == 0x0f), None);
    assert_eq!(function.capability(|header| header & 0xff == 0x10), Some(0x60));
    machine.set_config(8, 4, 0);
    assert_eq!(function.capability(|_| true), None);
}

#[test]
fn a_bar_claims_what_it_may_decode() {
    let machine = Machine::new();
    let function = Function::new(&machine, 8);
    let bar = |offset: u8, value: u64| {
        machine.set_config(8, offset, value as u32 | 0b1100);
        machine.set_config(8, offset + 4, (value >> 32) as u32);
    };
    bar(0x10, 0);
    bar(0x18, 0x000f_fffe_4000_0000);
    assert_eq!(function.claims(0x000f_fffe_4000_0000), Some(0x18));
    assert_eq!(function.claims(0x000f_fffe_7fff_ffff), Some(0x18));
    assert_eq!(function.claims(0x000f_fffe_8000_0000), None);
    assert_eq!(function.claims(0x000f_fffe_3fff_ffff), None);
    // The largest region of all.
    bar(0x20, 1 << 51);
    assert_eq!(function.claims(0x000f_ffff_ffe0_0000), Some(0x20));
    // A bridge has two registers only; what is at 18h are its bus numbers.
    machine.set_config(8, 0x0c, 0x0001_0000);
    assert_eq!(function.claims(0x000f_fffe_4000_0000), None);
}

/// One function whose registers have bits that are not writable.
struct Device {
    address: Cell<u32>,
    registers: RefCell<[u32; 64]>,
    writable: [u32; 64],
}

impl Device {
    fn new(set: &[(u8, u32, u32)]) -> Self {
        let (mut registers, mut writable) = ([0; 64], [0; 64]);
        (registers[0], registers[1], writable[1]) = (0x1234_8086, 0x0010_0006, 0xffff);
        for (offset, value, mask) in set {
            (registers[usize::from(offset / 4)], writable[usize::from(offset / 4)]) = (*value, *mask);
        }
        Self { address: Cell::new(0), registers: RefCell::new(registers), writable }
    }

    fn decodes(&self, start: u64, len: u64) -> Option<(u64, u64)> {
        let before = *self.registers.borrow();
        let range = Function::new(self, 0).decodes(&PhysRange::new(start, len).unwrap());
        assert_eq!(*self.registers.borrow(), before, "all is as it was");
        range.map(|r| (r.start(), r.len()))
    }
}

impl PortIo for Device {
    fn in8(&self, _: u16) -> u8 {
        unreachable!()
    }
    fn in16(&self, _: u16) -> u16 {
        unreachable!()
    }
    fn in32(&self, port: u16) -> u32 {
        assert_eq!(port, DATA);
        self.registers.borrow()[(self.address.get() as u8 / 4) as usize]
    }
    fn out8(&self, _: u16, _: u8) {
        unreachable!()
    }
    fn out16(&self, _: u16, _: u16) {
        unreachable!()
    }
    fn out32(&self, port: u16, value: u32) {
        if port == ADDRESS {
            return self.address.set(value);
        }
        let at = (self.address.get() as u8 / 4) as usize;
        let register = &mut self.registers.borrow_mut()[at];
        // Registers of bases move nothing that is decoded.
        assert!(at == 1 || (4..10).contains(&at));
        *register = *register & !self.writable[at] | value & self.writable[at];
    }
}

#[test]
fn a_register_decodes_as_much_as_it_says_when_asked() {
    let device = Device::new(&[
        (0x10, 0xc000_0000, 0xfff0_0000),
        (0x14, 0x0000_d001, 0xffff_fff0),
        (0x18, 0x8000_000c, 0x8000_0000),
        (0x1c, 0x0000_0040, 0xffff_ffff),
        (0x20, 0, 0xffff_f000),
    ]);
    // The flash, which the first register's base alone would not rule out.
    assert_eq!(device.decodes(0xffc0_0000, 0x40_0000), None);
    assert_eq!(device.decodes(0xc00f_f000, 0x1000), Some((0xc000_0000, 0x10_0000)));
    assert_eq!(device.decodes(0xc010_0000, 0x1000), None);
    assert_eq!(device.decodes(0xbfff_f000, 0x2000), Some((0xc000_0000, 0x10_0000)));
    assert_eq!(device.decodes(0x40_ffff_f000, 0x1000), Some((0x40_8000_0000, 0x8000_0000)));
    assert_eq!(device.decodes(0x41_0000_0000, 0x1000), None);
    // Neither ports nor a register without an address.
    assert_eq!(device.decodes(0xd000, 0x1000), None);
    assert_eq!(device.decodes(0, 0x1000), None);
}

#[test]
fn a_register_that_cannot_be_written_decodes_all_that_it_may() {
    let fixed = Device::new(&[(0x10, 0xfe01_0000, 0)]);
    assert_eq!(fixed.decodes(0xfe01_f000, 0x1000), Some((0xfe01_0000, 0x1_0000)));
    // Nor is a host bridge's written.
    let host = Device::new(&[(0x08, 0x0600_0000, 0), (0x10, 0xc000_0000, 0xfff0_0000)]);
    assert_eq!(host.decodes(0xffc0_0000, 0x40_0000), Some((0xc000_0000, 0x4000_0000)));
}

#[test]
fn a_bridge_decodes_its_windows() {
    let bridge = Device::new(&[
        (0x0c, 0x0001_0000, 0),
        (0x20, 0xc1f0_c100, 0),
        (0x24, 0x0011_0001, 0),
        (0x28, 0x38, 0),
        (0x2c, 0x38, 0),
    ]);
    assert_eq!(bridge.decodes(0xc1ff_f000, 0x1000), Some((0xc100_0000, 0x100_0000)));
    assert_eq!(bridge.decodes(0xc200_0000, 0x1000), None);
    assert_eq!(bridge.decodes(0x38_001f_f000, 0x1000), Some((0x38_0000_0000, 0x20_0000)));
    // Closed: the limit is below the base.
    let closed = Device::new(&[(0x0c, 0x0001_0000, 0), (0x20, 0x0000_fff0, 0), (0x24, 0x0000_fff0, 0)]);
    assert_eq!(closed.decodes(0xfff0_0000, 0x10_0000), None);
    let card = Device::new(&[(0x0c, 0x0002_0000, 0), (0x1c, 0xd000_0000, 0), (0x20, 0xd000_1000, 0)]);
    assert_eq!(card.decodes(0xd000_1000, 0x1000), Some((0xd000_0000, 0x2000)));
}
