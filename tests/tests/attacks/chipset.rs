//! Attacks by the chipset's configuration registers: those of the memory controller, the IOMMU, and a bridge whose register
//! block can be put over memory.

use super::{Access, SCRATCH, Target, access, number_after, read, seen, write};
use tests::machine::Machine;

/// A register of a PCI function of bus 0, a byte, and the bits to change.
struct Register {
    what: &'static str,
    /// What `/sys/bus/pci/devices` and configuration space in memory call it.
    device: u64,
    offset: u64,
    bits: u8,
}

/// Directory of a function.
fn folder(device: u64) -> String {
    format!("/sys/bus/pci/devices/0000:00:{:02x}.{}", device >> 3, device & 7)
}

/// Bytes of a file in the guest.
fn bytes<const N: usize>(machine: &mut Machine, file: &str, at: u64) -> [u8; N] {
    let text = machine.check(&format!("xxd -p -s {at} -l {N} {file}")).unwrap();
    hex::decode(text.trim()).unwrap().try_into().unwrap()
}

fn read_config<const N: usize>(machine: &mut Machine, device: u64, offset: u64) -> [u8; N] {
    bytes(machine, &format!("{}/config", folder(device)), offset)
}

fn config(machine: &mut Machine, register: &Register) -> u8 {
    read_config::<1>(machine, register.device, register.offset)[0]
}

fn write_config(machine: &mut Machine, device: u64, offset: u64, bytes: &[u8]) {
    let text: String = bytes.iter().map(|b| format!("\\x{b:02x}")).collect();
    let (file, size) = (folder(device), bytes.len());
    // One access of that size, or Linux takes it apart.
    let to = format!("dd of={file}/config bs={size} oflag=seek_bytes seek={offset} conv=notrunc status=none");
    machine.check(&format!("printf '{text}' | {to}")).unwrap();
}

/// Writes registers that only the MLE may write, by ports and by memory; reading them is anybody's right.
pub fn registers(target: &mut Target) {
    let Target { machine, protected, .. } = target;
    let output = machine.check("cd /sys/bus/pci/devices && grep -l 0x080600 */class").unwrap();
    let iommu = number_after(&output, "0000:00:") << 3 | number_after(&output, ".");
    let ecam = u64::from_le_bytes(bytes(machine, "/sys/firmware/acpi/tables/MCFG", 44));
    let registers = [
        Register { what: "PAM1: what is memory at C0000h", device: 0, offset: 0x91, bits: 0x11 },
        Register { what: "the IOMMU's own", device: iommu, offset: 0xfc, bits: 0xff },
    ];
    for register in registers {
        let what = register.what;
        let old = config(machine, &register);
        let changed = if *protected { old } else { old ^ register.bits };
        write_config(machine, register.device, register.offset, &[old ^ register.bits]);
        assert_eq!(config(machine, &register), changed, "{what}, by ports");
        write_config(machine, register.device, register.offset, &[old]);
        let at = ecam + (register.device << 12) + register.offset;
        let other = Access::write(at, (old ^ register.bits).into()).bits(8);
        assert_eq!(access(machine, &[other]), [Ok(0)]);
        assert_eq!(config(machine, &register), changed, "{what}, by memory");
        assert_eq!(access(machine, &[Access::write(at, old.into()).bits(8)]), [Ok(0)]);
        let identity = access(machine, &[Access::read(at - register.offset)])[0].unwrap();
        assert!(identity != 0 && identity as u32 != u32::MAX, "{what}: identity {identity:#x}");
        seen(&format!("guest: configuration register, {what}"), *protected);
    }
}

/// Puts the LPC bridge's register block over memory.
pub fn register_block(target: &mut Target) {
    const LPC: u64 = 0xf8;
    const RCBA: u64 = 0xf0;
    const VALUE: u64 = 0x1122_3344_5566_7788;
    const ENABLE: u64 = 1;
    let Target { machine, protected, .. } = target;
    let old: [u8; 4] = read_config(machine, LPC, RCBA);
    write(machine, SCRATCH, VALUE);
    write_config(machine, LPC, RCBA, &(SCRATCH as u32 | ENABLE as u32).to_le_bytes());
    let found = read(machine, SCRATCH);
    write_config(machine, LPC, RCBA, &old);
    assert_eq!(found == VALUE, *protected, "{found:#x}");
    assert_eq!(read(machine, SCRATCH), VALUE);
    // Another of its registers is the guest's.
    let route = Register { what: "PIRQA", device: LPC, offset: 0x60, bits: 1 };
    let old = config(machine, &route);
    write_config(machine, LPC, route.offset, &[old ^ route.bits]);
    assert_eq!(config(machine, &route), old ^ route.bits);
    write_config(machine, LPC, route.offset, &[old]);
    seen("guest: put a register block over memory", *protected);
}
