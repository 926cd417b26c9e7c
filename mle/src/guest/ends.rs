//! The ports by which the guest ends the machine: what waits for its end is carried out before they are written.

use firmware::acpi::EndPorts;
use hv::io::{Clock, PortIo, poll_until};
use spin::Once;

use super::ports as guarded;
use crate::backend::PortMap;

/// High byte of PM1 control: SLP_EN.
const SLEEP: u8 = 1 << 5;
/// Reset control register; RST_CPU.
const RESET_CONTROL: (u16, u8) = (0xcf9, 1 << 2);
/// System control port A; fast reset.
const CONTROL_A: (u16, u8) = (0x92, 1);
/// Keyboard controller; pulse the reset line.
const KEYBOARD: (u16, u8) = (0x64, 0xfe);

/// Longest time from such a write to the machine's end, in microseconds; as long as Linux waits.
const END_BUDGET_US: u64 = 10_000_000;

/// Set where something may wait for the machine's end.
static PORTS: Once<EndPorts> = Once::new();

/// An OUT of the low `size` bytes of `value`.
struct Write {
    port: u16,
    size: u8,
    value: u32,
}

/// How the guest has ended the machine, to be carried out by the CPU that is left.
static LAST: Once<Write> = Once::new();

/// Makes the guest's writes to these ports exit.
pub fn guard(map: &mut PortMap, ports: EndPorts) {
    let fixed = [RESET_CONTROL.0, CONTROL_A.0, KEYBOARD.0];
    let sleep = ports.pm1_control.into_iter().flatten().filter_map(|port| port.checked_add(1));
    let reset = ports.reset.map(|(port, _)| port);
    sleep.chain(fixed).chain(reset).for_each(|port| map.intercept(port));
    PORTS.call_once(|| ports);
}

/// Whether an OUT of the low `size` bytes of `value` ends the machine. Sleep counts: firmware runs before the guest does.
pub fn is_end(port: u16, size: u8, value: u32) -> bool {
    PORTS.get().is_some_and(|ports| ends(ports, port, size, value))
}

/// Keeps an OUT that [ends](is_end) the machine for [`carry_out`].
pub fn keep(port: u16, size: u8, value: u32) {
    LAST.call_once(|| Write { port, size, value });
}

/// Makes the write that was kept, if any, and waits for the machine's end. Comes back if that does not come, or not for good: the kinds of
/// sleep that a CPU goes on after have no guest to go on with.
pub fn carry_out(ports: &impl PortIo, clock: &impl Clock) {
    let (Some(known), Some(write)) = (PORTS.get(), LAST.get()) else { return };
    make(known, write, ports);
    let _ = poll_until(clock, END_BUDGET_US, || false);
}

/// Where sleep takes two registers, the guest would write the other one next. The kind of sleep is there already.
///
/// Spec: \[ACPI\] "PM1 Control Registers".
fn make(known: &EndPorts, &Write { port, size, value }: &Write, ports: &impl PortIo) {
    guarded::write(ports, port, size, value, |_, _| ());
    if sleeps(known, port, size, value) {
        let others = known.pm1_control.into_iter().flatten();
        for other in others.filter(|other| *other != port && other.checked_add(1) != Some(port)) {
            ports.out16(other, ports.in16(other) | u16::from(SLEEP) << 8);
        }
    }
}

fn sleeps(ports: &EndPorts, port: u16, size: u8, value: u32) -> bool {
    (0..u16::from(size)).zip(value.to_le_bytes()).any(|(offset, byte)| {
        let here = port.wrapping_add(offset);
        byte & SLEEP != 0 && ports.pm1_control.iter().flatten().any(|p| p.wrapping_add(1) == here)
    })
}

fn ends(ports: &EndPorts, port: u16, size: u8, value: u32) -> bool {
    // These are registers of a byte: a wider access at CF8h is for PCI configuration space.
    let byte = value as u8;
    let flagged = [RESET_CONTROL, CONTROL_A].iter().any(|(p, bit)| *p == port && byte & bit != 0);
    sleeps(ports, port, size, value)
        || size == 1 && (flagged || (port, byte) == KEYBOARD || ports.reset == Some((port, byte)))
}

#[cfg(test)]
mod tests {
    use core::cell::RefCell;

    use super::*;

    #[test]
    fn each_way_to_end_the_machine_is_known_and_other_writes_are_not() {
        let ports = EndPorts { pm1_control: [Some(0x604), None], reset: Some((0xcf9, 0x0f)) };
        for (port, size, value) in [
            (0x604, 2, 0x3401),
            (0x604, 4, 0x2000),
            (0x605, 1, 0x20),
            (0xcf9, 1, 0x06),
            (0x64, 1, 0xfe),
            (0x92, 1, 0x01),
        ] {
            assert!(ends(&ports, port, size, value), "{port:#x} {size} {value:#x}");
        }
        for (port, size, value) in [
            (0x604, 2, 0x1c01),
            (0x604, 1, 0x20),
            (0xcf9, 1, 0x02),
            (0xcf8, 4, 0x8000_0400),
            (0x64, 1, 0xd1),
            (0x92, 1, 2),
        ] {
            assert!(!ends(&ports, port, size, value), "{port:#x} {size} {value:#x}");
        }
        let mut map = PortMap::open();
        guard(&mut map, ports);
        assert!(map.intercepts(0x604, 2) && map.intercepts(0xcf9, 1) && !map.intercepts(0x604, 1));
    }

    /// Two PM1 control registers that hold a kind of sleep, as OUTs see them.
    #[derive(Default)]
    struct Pm1(RefCell<Vec<(u16, u8, u32)>>);

    impl PortIo for Pm1 {
        fn in8(&self, port: u16) -> u8 {
            panic!("IN from {port:#x}")
        }
        fn in16(&self, _: u16) -> u16 {
            0x1401
        }
        fn in32(&self, port: u16) -> u32 {
            panic!("IN from {port:#x}")
        }
        fn out8(&self, port: u16, value: u8) {
            self.0.borrow_mut().push((port, 1, value.into()));
        }
        fn out16(&self, port: u16, value: u16) {
            self.0.borrow_mut().push((port, 2, value.into()));
        }
        fn out32(&self, port: u16, value: u32) {
            self.0.borrow_mut().push((port, 4, value));
        }
    }

    #[test]
    fn a_sleep_is_carried_out_by_both_registers_and_a_reset_by_its_port() {
        let known = EndPorts { pm1_control: [Some(0x604), Some(0x704)], reset: None };
        let made = |port, size, value| {
            let ports = Pm1::default();
            make(&known, &Write { port, size, value }, &ports);
            ports.0.into_inner()
        };
        assert_eq!(made(0x604, 2, 0x3401), [(0x604, 2, 0x3401), (0x704, 2, 0x3401)]);
        assert_eq!(made(0x705, 1, 0x34), [(0x705, 1, 0x34), (0x604, 2, 0x3401)]);
        assert_eq!(made(0xcf9, 1, 6), [(0xcf9, 1, 6)]);
    }
}
