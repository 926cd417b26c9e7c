//! The ports by which the guest ends the machine: what waits for its end is carried out before they are written.

use firmware::acpi::EndPorts;
use spin::Once;

use crate::backend::PortMap;

/// High byte of PM1 control: SLP_EN.
const SLEEP: u8 = 1 << 5;
/// Reset control register; RST_CPU.
const RESET_CONTROL: (u16, u8) = (0xcf9, 1 << 2);
/// System control port A; fast reset.
const CONTROL_A: (u16, u8) = (0x92, 1);
/// Keyboard controller; pulse the reset line.
const KEYBOARD: (u16, u8) = (0x64, 0xfe);

/// Set where something may wait for the machine's end.
static PORTS: Once<EndPorts> = Once::new();

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

fn ends(ports: &EndPorts, port: u16, size: u8, value: u32) -> bool {
    let sleeps = (0..u16::from(size)).zip(value.to_le_bytes()).any(|(offset, byte)| {
        let here = port.wrapping_add(offset);
        byte & SLEEP != 0 && ports.pm1_control.iter().flatten().any(|p| p.wrapping_add(1) == here)
    });
    // These are registers of a byte: a wider access at CF8h is for PCI configuration space.
    let byte = value as u8;
    let flagged = [RESET_CONTROL, CONTROL_A].iter().any(|(p, bit)| *p == port && byte & bit != 0);
    sleeps || size == 1 && (flagged || (port, byte) == KEYBOARD || ports.reset == Some((port, byte)))
}

#[cfg(test)]
mod tests {
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
}
