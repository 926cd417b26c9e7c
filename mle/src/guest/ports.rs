//! The ports that the MLE guards.
//!
//! Two devices can mask address line 20: addresses of odd MiB then lead one MiB lower, behind the nested tables. SKINIT
//! makes the CPU ignore the mask (VM_CR.DIS_A20M). Where a CPU has no such bit, the ports that raise the mask are the MLE's:
//! the rest of what they do goes through.
//!
//! A write of the SMI command port starts firmware in SMM: policy decides.

use core::sync::atomic::{AtomicU16, Ordering};

use firmware::exposure::{Decision, Kind, Record, Text};
use firmware::sandbox::SMI_COMMAND;
use hv::io::PortIo;
use hv::vcpu::Exit;

use super::pci;
use crate::backend::{PortMap, Vcpu};
use crate::exposure;
use crate::metal::{Ports, TscClock};

/// System control port A: bit 1 is A20.
const CONTROL_A: u16 = 0x92;
const A20: u8 = 1 << 1;
/// Keyboard controller, command.
const KEYBOARD: u16 = 0x64;
/// Commands: write the output port, whose bit 1 is A20; clear A20.
const MASKING: [u8; 2] = [0xd1, 0xdd];

/// The FADT's SMI command port, where it is another than [`SMI_COMMAND`]; 0 where not.
static OTHER_SMI: AtomicU16 = AtomicU16::new(0);

/// Makes the guest's accesses to the SMI command port exit, and to the other one that the FADT names.
pub fn guard_smi(map: &mut PortMap, other: Option<u16>) {
    map.intercept(SMI_COMMAND);
    if let Some(port) = other {
        map.intercept(port);
        OTHER_SMI.store(port, Ordering::Relaxed);
    }
}

/// Makes the guest's accesses to the ports of address line 20 exit, and unmasks the line.
pub fn guard_a20(map: &mut PortMap, ports: &impl PortIo) {
    map.intercept(CONTROL_A);
    map.intercept(KEYBOARD);
    ports.out8(CONTROL_A, (ports.in8(CONTROL_A) | A20) & !1); // bit 0 resets
}

/// Does an OUT of the low `size` bytes of `value` for the guest, without what would mask the line. A byte for an SMI
/// command port goes to `smi` alone, with the port.
pub fn write(ports: &impl PortIo, port: u16, size: u8, value: u32, smi: impl FnMut(u16, u8)) {
    let other = OTHER_SMI.load(Ordering::Relaxed);
    write_guarded(ports, port, size, value, if other == 0 { SMI_COMMAND } else { other }, smi);
}

fn write_guarded(
    ports: &impl PortIo,
    port: u16,
    size: u8,
    value: u32,
    other_smi: u16,
    mut smi: impl FnMut(u16, u8),
) {
    let guarded = [CONTROL_A, KEYBOARD, SMI_COMMAND, other_smi];
    if !(0..u16::from(size)).any(|offset| guarded.contains(&port.wrapping_add(offset))) {
        // Exits for another port beside it: devices tell widths apart.
        return forward(ports, port, size, value);
    }
    for (offset, byte) in (0..u16::from(size)).zip(value.to_le_bytes()) {
        match port.wrapping_add(offset) {
            CONTROL_A => ports.out8(CONTROL_A, byte | A20),
            at if at == SMI_COMMAND || at == other_smi => smi(at, byte),
            KEYBOARD if MASKING.contains(&byte) => {}
            other => ports.out8(other, byte),
        }
    }
}

/// IN of `size` bytes.
pub fn read(ports: &impl PortIo, port: u16, size: u8) -> u32 {
    match size {
        1 => ports.in8(port).into(),
        2 => ports.in16(port).into(),
        _ => ports.in32(port),
    }
}

/// OUT of the low `size` bytes of `value`.
pub fn forward(ports: &impl PortIo, port: u16, size: u8, value: u32) {
    match size {
        1 => ports.out8(port, value as u8),
        2 => ports.out16(port, value as u16),
        _ => ports.out32(port, value),
    }
}

/// Goes on after an intercepted port access.
pub fn finish_port(vcpu: &mut Vcpu<'_>, exit: Exit) {
    if let Exit::Port { next_rip, .. } = exit {
        vcpu.skip_to(next_rip);
    }
}

/// Goes on after an intercepted IN that reads `value`.
pub fn finish_input(vcpu: &mut Vcpu<'_>, exit: Exit, value: u32) {
    let Exit::Port { size, .. } = exit else { return };
    let (rax, value) = (vcpu.gprs().rax, u64::from(value));
    vcpu.gprs_mut().rax = match size {
        1 => rax & !0xff | value & 0xff,
        2 => rax & !0xffff | value & 0xffff,
        _ => value,
    };
    finish_port(vcpu, exit);
}

/// Does an access of the guest's kernel, or of firmware with its rights, to a port that is guarded. PCI configuration is
/// judged here, `write` does other OUTs. `by`: the CPU, by its APIC ID.
pub fn guarded_access(
    vcpu: &mut Vcpu<'_>,
    exit: Exit,
    by: u32,
    ports: &Ports,
    clock: &TscClock,
    write: impl FnOnce(u16, u8, u32),
) {
    let Exit::Port { port, size, input, .. } = exit else { return };
    let value = vcpu.gprs().rax as u32;
    match pci::access(ports, port, size, (!input).then_some(value)) {
        pci::Answer::Value(value) => finish_input(vcpu, exit, value),
        pci::Answer::Written => finish_port(vcpu, exit),
        pci::Answer::Dropped(refusal) => {
            if refusal.first {
                let record = Record::new(Kind::REFUSED, by, exposure::now_us(clock));
                let (text, decision) = (Some(Text::new(refusal)), Decision::DENIED);
                exposure::record(&Record { text, decision, ..record });
            }
            finish_port(vcpu, exit);
        }
        pci::Answer::NotOurs if input => port_access(vcpu, exit, Some(*ports)),
        pci::Answer::NotOurs => {
            write(port, size, value);
            finish_port(vcpu, exit);
        }
    }
}

/// Does a port access for a virtual machine, or pretends that no device is there.
pub fn port_access(vcpu: &mut Vcpu<'_>, exit: Exit, ports: Option<Ports>) {
    let Exit::Port { port, size, input, .. } = exit else { return };
    if input {
        let value = ports.map_or(u32::MAX, |ports| read(&ports, port, size));
        return finish_input(vcpu, exit, value);
    }
    if let Some(ports) = ports {
        forward(&ports, port, size, vcpu.gprs().rax as u32);
    }
    finish_port(vcpu, exit);
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::RefCell;

    #[derive(Default)]
    struct Ports(RefCell<Vec<(u16, u8)>>);
    impl PortIo for Ports {
        fn in8(&self, _: u16) -> u8 {
            1
        }
        fn in16(&self, _: u16) -> u16 {
            0
        }
        fn in32(&self, _: u16) -> u32 {
            0
        }
        fn out8(&self, port: u16, value: u8) {
            self.0.borrow_mut().push((port, value));
        }
        fn out16(&self, _: u16, _: u16) {
            panic!("a guarded port's write goes by bytes");
        }
        fn out32(&self, port: u16, value: u32) {
            assert_eq!((port, value), (0xcf8, 0x8000_0400), "a guarded port's write goes by bytes");
        }
    }

    #[test]
    fn no_write_masks_the_line_and_others_go_through() {
        let ports = Ports::default();
        let write = |port, size, value| write(&ports, port, size, value, |_, _| panic!("no SMI"));
        write(0x92, 1, 0);
        write(0x64, 1, 0xd1);
        write(0x64, 1, 0xdd);
        write(0x64, 1, 0xfe);
        write(0x91, 2, 0x0000);
        write(0x63, 2, 0xd100);
        write(0xcf8, 4, 0x8000_0400);
        assert_eq!(*ports.0.borrow(), [(0x92, 2), (0x64, 0xfe), (0x91, 0), (0x92, 2), (0x63, 0)]);
    }

    #[test]
    fn a_command_for_smm_is_found_in_any_access_to_either_port() {
        let (ports, mut map) = (Ports::default(), PortMap::open());
        map.intercept(SMI_COMMAND);
        map.intercept(0x1480);
        let mut commands = Vec::new();
        for (port, size, value) in [
            (0xb2, 1, 0x17),
            (0xb0, 4, 0x0023_0000),
            (0xb1, 2, 0x4200),
            (0x1480, 1, 0x11),
            (0x147e, 4, 0x1200_0000 | 0x0013_0000),
        ] {
            assert!(map.intercepts(port, size));
            write_guarded(&ports, port, size, value, 0x1480, |port, command| commands.push((port, command)));
        }
        assert_eq!(commands, [(0xb2, 0x17), (0xb2, 0x23), (0xb2, 0x42), (0x1480, 0x11), (0x1480, 0x13)]);
        assert!(ports.0.borrow().iter().all(|(port, _)| *port != 0xb2 && *port != 0x1480));
    }

    #[test]
    fn guarding_unmasks_and_does_not_reset() {
        let (ports, mut map) = (Ports::default(), PortMap::open());
        guard_a20(&mut map, &ports);
        assert_eq!(*ports.0.borrow(), [(0x92, 2)]);
        assert!(map.intercepts(0x90, 4) && map.intercepts(0x64, 1) && !map.intercepts(0x60, 4));
    }
}
